// What the two halves of the fake device share: the state of its "driver" (runtime.cpp), which the operators
// (operators.cpp) ask.
#pragma once

#include <torch/extension.h>

#include <functional>
#include <string>
#include <vector>

namespace fake {

constexpr int kDevices = 2;

// The current device and stream belong to a thread, as in CUDA.
int current_device();
int exchange_device(int device);  // a negative one changes nothing
int64_t current_stream(int device);
int64_t exchange_stream(int device, int64_t stream);

c10::Allocator* device_allocator();
// Whether pinned memory of ours holds this address.
bool is_pinned(const void* address);
// Index of the device on which memory that is in use holds this address, or -1.
int device_of(const void* address);

// The host would wait for the device here: an error under capture, and what set_sync_debug_mode says elsewhere.
void host_waits(const std::string& why);
// What CUDA refuses while a stream is recorded, as torch raises it.
[[noreturn]] void refuse_in_capture(const std::string& what);

// A recorded CUDA graph. Memory that was allocated while it was recorded is its own as long as it lives.
struct Graph {
  std::vector<std::function<void()>> nodes;
  std::vector<void*> blocks;
  ~Graph();
};
bool capturing();
void record(std::function<void()> node);
// Written to memory that holds nothing yet, or nothing any more: NaN in every floating-point format.
void scramble(void* memory, size_t n_bytes);

// Operators called by operators, in a fallback, wait for nobody and are not recorded once more.
struct Inside {
  Inside();
  ~Inside();
  static bool now();
};

// A copy that a caller asked for. `kind` is h2d, d2h, d2d, or p2p between devices.
struct Copy {
  std::string kind;
  int64_t n_bytes;
  bool pinned, non_blocking;
};
void note(const Copy& copy);

void bind_runtime(pybind11::module_& module);

}  // namespace fake

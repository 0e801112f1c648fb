// The "driver": two devices whose memory is host memory, with the rules that CUDA has for it.
#include "runtime.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

namespace py = pybind11;

namespace fake {
namespace {

enum SyncMode { kDefault, kWarn, kError };

thread_local int device_now = 0;
thread_local std::array<int64_t, kDevices> stream_now = {};
thread_local int depth = 0;
SyncMode sync_mode = kDefault;
// torch before 2.11 allocates no pinned memory for a graph
bool graphs_own_pinned_memory = true;
std::shared_ptr<Graph> recording;
std::vector<Copy> copies;

std::mutex mutex;

struct Block {
  size_t n_bytes;
  int device;  // -1: pinned host memory
  Graph* owner;
};
using Blocks = std::map<uintptr_t, Block>;
Blocks blocks;

// Freed memory stays unused, and poisoned, for a while, so that who reads it finds no data of the next owner.
std::deque<std::pair<void*, size_t>> freed;
size_t freed_bytes = 0;
constexpr size_t kFreedAtMost = 64u << 20;
// Or it is handed out again at once, as a caching allocator does: where time is measured.
bool poisons = true;
std::map<size_t, std::vector<void*>> cached;

const Block* find(const void* address) {
  auto next = blocks.upper_bound((uintptr_t)address);
  if (next == blocks.begin()) return nullptr;
  auto found = std::prev(next);
  return (uintptr_t)address < found->first + found->second.n_bytes ? &found->second : nullptr;
}

void* take(size_t n_bytes, int device) {
  void* memory = nullptr;
  // as CUDA's, which Triton's alignment rests on
  n_bytes = (n_bytes + 511) / 512 * 512;
  std::lock_guard<std::mutex> lock(mutex);
  if (auto found = cached.find(n_bytes); found != cached.end() && !found->second.empty()) {
    memory = found->second.back();
    found->second.pop_back();
  } else {
    TORCH_CHECK(posix_memalign(&memory, 512, n_bytes) == 0, "the fake device is out of memory");
  }
  if (poisons) scramble(memory, n_bytes);
  blocks[(uintptr_t)memory] = {n_bytes, device, recording.get()};
  return memory;
}

// Both locks are the caller's.
void bury(void* memory, size_t n_bytes) {
  if (!poisons) {
    cached[n_bytes].push_back(memory);
    return;
  }
  scramble(memory, n_bytes);
  freed.emplace_back(memory, n_bytes);
  freed_bytes += n_bytes;
  while (freed_bytes > kFreedAtMost) {
    freed_bytes -= freed.front().second;
    std::free(freed.front().first);
    freed.pop_front();
  }
}

void give_back(void* memory) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find((uintptr_t)memory);
  if (found == blocks.end()) return;
  if (found->second.owner) {
    // a graph's replays go on using it
    found->second.owner->blocks.push_back(memory);
    return;
  }
  bury(memory, found->second.n_bytes);
  blocks.erase(found);
}
void nothing(void*) {}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    c10::Device device(c10::DeviceType::CUDA, device_now);
    if (!n_bytes) return {nullptr, nullptr, &nothing, device};
    void* memory = take(n_bytes, device_now);
    return {memory, memory, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t n_bytes) const override { std::memcpy(to, from, n_bytes); }
};
DeviceAllocator the_device_allocator;

struct PinnedAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t n_bytes) override {
    if (!n_bytes) return {nullptr, nullptr, &nothing, c10::Device(c10::DeviceType::CPU)};
    if (recording && !graphs_own_pinned_memory) refuse_in_capture("pinned memory");
    void* memory = take(n_bytes, -1);
    return {memory, memory, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t n_bytes) const override { std::memcpy(to, from, n_bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedAllocator the_pinned_allocator;

// What torch's device and stream guards call.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, (c10::DeviceIndex)device_now}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {c10::DeviceType::CUDA, (c10::DeviceIndex)exchange_device(device.index())};
  }
  void setDevice(c10::Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange_device(device.index()); }
  c10::Stream stream(c10::Device device, int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, device, id);
  }
  c10::Stream getStream(c10::Device device) const override { return stream(device, current_stream(device.index())); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return stream(device, 1); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device, 1); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(next.device(), exchange_stream(next.device_index(), next.id()));
  }
  bool isStreamCapturing(const c10::Stream&) const override { return capturing(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_waits("a stream"); }
  void synchronizeEvent(void*) const override { host_waits("an event"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { host_waits("a device"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// What the rest of torch asks of a CUDA build.
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return device_now; }
  c10::DeviceIndex getCurrentDevice() const override { return device_now; }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchange_device(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &the_pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &the_device_allocator; }
  void deviceSynchronize(c10::DeviceIndex) const override { host_waits("a device"); }
};

}  // namespace

int current_device() { return device_now; }
int exchange_device(int device) {
  TORCH_CHECK(device < kDevices, "CUDA error: invalid device ordinal");
  int before = device_now;
  if (device >= 0) device_now = device;
  return before;
}
int64_t current_stream(int device) { return stream_now[device < 0 ? device_now : device]; }
int64_t exchange_stream(int device, int64_t stream) {
  return std::exchange(stream_now[device < 0 ? device_now : device], stream);
}

c10::Allocator* device_allocator() { return &the_device_allocator; }
bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = find(address);
  return block && block->device < 0;
}
int device_of(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = find(address);
  return block ? block->device : -1;
}

void refuse_in_capture(const std::string& what) {
  // 900: cudaErrorStreamCaptureUnsupported
  throw c10::AcceleratorError(
      {__func__, __FILE__, (uint32_t)__LINE__}, 900,
      "CUDA error: operation not permitted when stream is capturing (" + what + ")");
}
void host_waits(const std::string& why) {
  if (Inside::now()) return;
  if (capturing()) refuse_in_capture(why);
  TORCH_CHECK(sync_mode != kError, "called a synchronizing CUDA operation: ", why);
  if (sync_mode == kWarn) TORCH_WARN("called a synchronizing CUDA operation: ", why);
}

Graph::~Graph() {
  std::lock_guard<std::mutex> lock(mutex);
  for (void* memory : blocks) {
    auto found = fake::blocks.find((uintptr_t)memory);
    if (found == fake::blocks.end()) continue;
    bury(memory, found->second.n_bytes);
    fake::blocks.erase(found);
  }
  for (auto& [_, block] : fake::blocks)
    if (block.owner == this) block.owner = nullptr;
}
bool capturing() { return recording != nullptr; }
void record(std::function<void()> node) { recording->nodes.push_back(std::move(node)); }
void scramble(void* memory, size_t n_bytes) { std::memset(memory, 0xFF, n_bytes); }

Inside::Inside() { depth++; }
Inside::~Inside() { depth--; }
bool Inside::now() { return depth > 0; }

void note(const Copy& copy) { copies.push_back(copy); }

void bind_runtime(py::module_& m) {
  c10::SetAllocator(c10::DeviceType::CUDA, &the_device_allocator);
  at::setHostAllocator(at::kCUDA, &the_pinned_allocator);
  m.def("current_device", &current_device);
  m.def("exchange_device", &exchange_device);
  m.def("current_stream", &current_stream);
  m.def("exchange_stream", &exchange_stream);
  m.def("host_waits", &host_waits);
  m.def("sync_mode", [] { return (int)sync_mode; });
  m.def("set_sync_mode", [](int mode) { sync_mode = (SyncMode)mode; });
  m.def("reuse_memory_at_once", [] { poisons = false; });
  m.def("set_graphs_own_pinned_memory", [](bool own) { graphs_own_pinned_memory = own; });
  m.def("device_of", [](uintptr_t address) { return device_of((void*)address); });
  m.def("bytes_in_use", [] {
    std::lock_guard<std::mutex> lock(mutex);
    size_t total = 0;
    for (auto& [_, block] : blocks) total += block.device < 0 ? 0 : block.n_bytes;
    return total;
  });
  m.def("take_copies", [] {
    std::vector<std::tuple<std::string, int64_t, bool, bool>> taken;
    for (auto& c : copies) taken.emplace_back(c.kind, c.n_bytes, c.pinned, c.non_blocking);
    copies.clear();
    return taken;
  });
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph")
      .def(py::init<>())
      .def("__len__", [](const Graph& graph) { return graph.nodes.size(); })
      .def("replay", [](const Graph& graph) {
        for (auto& node : graph.nodes) node();
      });
  m.def("capturing", &capturing);
  m.def("begin_capture", [](std::shared_ptr<Graph> graph) {
    if (recording) refuse_in_capture("a capture in a capture");
    recording = std::move(graph);
  });
  m.def("end_capture", [] { recording.reset(); });
  m.def("record", [](py::function node) {
    record([node] {
      py::gil_scoped_acquire gil;
      node();
    });
  });
}

}  // namespace fake

namespace at {
using fake::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks);
}  // namespace at

// Operators of the fake device: what makes tensors, copies and waits is written out, and everything else is the CPU's
// operator on aliases of the same memory (`fallback`). While a graph is recorded nothing is written.
#include "runtime.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <set>

using at::Tensor;
using torch::jit::Stack;

namespace fake {
namespace {

// ------------------------------------------------------------------------------------------------- memory of tensors

c10::Device on(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }
c10::Device device_or_current(std::optional<at::Device> device) {
  return on(device && device->has_index() ? device->index() : (c10::DeviceIndex)current_device());
}
const c10::DispatchKeySet kCuda(c10::DispatchKey::CUDA);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, device_allocator(), kCuda, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kCuda, c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor host_view(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto out = at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) out._set_conj(true);
  if (tensor.is_neg()) out._set_neg(true);
  return out;
}

void write(const Tensor& to, const Tensor& from) {
  at::AutoDispatchBelowAutograd below;
  Inside inside;
  host_view(to).copy_(host_view(from));
}

Tensor to_device(const Tensor& on_cpu, c10::DeviceIndex device) {
  auto out = empty_strided(on_cpu.sizes(), on_cpu.strides(), on_cpu.scalar_type(), std::nullopt, on(device), std::nullopt);
  write(out, on_cpu);
  return out;
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  size_t n_bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (n_bytes > storage->nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto memory = device_allocator()->allocate(n_bytes);
    if (storage->nbytes()) std::memcpy(memory.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(memory));
    storage->set_nbytes(n_bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  auto* allocator = device_allocator();
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator->allocate(0), allocator, true);
  return at::native::set_storage_cpu_(self, storage, 0, {0}, {});
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  int64_t numel = storage.nbytes() / self.itemsize();
  return at::native::set_storage_cpu_(self, storage, 0, {numel}, {});
}

// ------------------------------------------------------------------------------------------------- copies and waits

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (Inside::now()) {
    write(self, from);
    return self;
  }
  if (self.numel()) {
    bool leaves = from.is_cuda(), arrives = self.is_cuda();
    bool crosses = leaves != arrives;
    bool pinned = crosses && is_pinned((leaves ? self : from).const_data_ptr());
    const char* kind = !crosses ? (self.device() == from.device() ? "d2d" : "p2p") : arrives ? "h2d" : "d2h";
    note({kind, (int64_t)self.nbytes(), pinned, non_blocking});
    if (crosses && !non_blocking) host_waits(std::string("a blocking copy, ") + kind);
    // the graph would read it at every replay, when somebody else has it
    if (crosses && capturing() && !pinned) refuse_in_capture("a copy of memory that is not pinned");
  }
  if (!capturing())
    write(self, from);
  else
    record([to = host_view(self), from = host_view(from)] { write(to, from); });
  return self;
}

at::Scalar item(const Tensor& self) {
  host_waits("_local_scalar_dense, .item()");
  return host_view(self).item();
}

// Their results' shapes depend on values, so the host has to look.
const std::set<std::string> kWaiting = {
    "nonzero", "nonzero.out", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount",
    "repeat_interleave.Tensor",
};
// They take lists from several devices.
const std::set<std::string> kAcrossDevices = {"_foreach_copy_"};

// ------------------------------------------------------------------------------------------------- everything else

bool has_tensor(const c10::IValue& value) { return value.isTensor() && value.toTensor().defined(); }

// Calls `visit` for every tensor of an argument.
template <class Visit>
void for_each_tensor(const c10::IValue& value, Visit visit) {
  if (has_tensor(value)) visit(value.toTensor());
  if (value.isTensorList())
    for (const Tensor& tensor : value.toTensorVector()) visit(tensor);
  if (value.isOptionalTensorList())
    for (const auto& tensor : value.toOptionalTensorVector())
      if (tensor && tensor->defined()) visit(*tensor);
}

// The value with every tensor replaced by what `change` makes of it.
template <class Change>
c10::IValue changed(const c10::IValue& value, Change change) {
  if (has_tensor(value)) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      if (tensor && tensor->defined())
        list.push_back(change(*tensor));
      else
        list.push_back(std::nullopt);
    }
    return list;
  }
  return value;
}

struct Call {
  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema = op.schema();
  std::string name;
  c10::DeviceIndex device;

  Call(const c10::OperatorHandle& op, const std::vector<c10::IValue>& args) : op(op) {
    name = schema.operator_name().name.substr(sizeof("aten::") - 1);
    if (!schema.operator_name().overload_name.empty()) name += "." + schema.operator_name().overload_name;
    check(args);
  }

  bool writes(size_t i) const {
    auto* info = schema.arguments()[i].alias_info();
    return info && info->isWrite();
  }
  bool writes_any() const {
    for (size_t i = 0; i < schema.arguments().size(); i++)
      if (writes(i)) return true;
    return false;
  }
  // Index of the argument that result `r` is, or -1.
  int argument_of_result(size_t r) const {
    auto* info = schema.returns()[r].alias_info();
    if (!info || !info->isWrite()) return -1;
    for (size_t i = 0; i < schema.arguments().size(); i++) {
      auto* own = schema.arguments()[i].alias_info();
      if (own && *own == *info) return i;
    }
    return -1;
  }

  // The errors of a GPU: tensors of two devices, and waits.
  void check(const std::vector<c10::IValue>& args) {
    bool any = false, indexes = name.rfind("index", 0) == 0 || name.rfind("_index", 0) == 0;
    device = current_device();
    for (const auto& arg : args) {
      if (arg.isDevice()) device = device_or_current(arg.toDevice()).index();
      for_each_tensor(arg, [&](const Tensor& tensor) {
        if (!tensor.is_cuda()) return;
        TORCH_CHECK(!any || device == tensor.device().index() || kAcrossDevices.count(name),
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:", (int)device,
                    " and ", tensor.device(), "! (", name, ")");
        device = tensor.device().index();
        any = true;
        device_is_real(tensor);
      });
    }
    for (const auto& arg : args) {
      for_each_tensor(arg, [&](const Tensor& tensor) {
        bool mask = tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
        if (arg.isOptionalTensorList() && mask) host_waits("a mask as an index, " + name);
        if (!any || tensor.is_cuda() || tensor.dim() == 0) return;
        TORCH_CHECK(indexes,
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:", (int)device,
                    " and cpu! (", name, ")");
        host_waits("an index on the CPU, " + name);
      });
    }
    if (kWaiting.count(name)) host_waits(name);
  }
  static void device_is_real(const Tensor& tensor) {
    TORCH_CHECK(!tensor.numel() || device_of(tensor.const_data_ptr()) == tensor.device().index(),
                "CUDA error: an illegal memory access was encountered: a tensor's memory was freed");
  }

  // Runs the CPU's operator on the memory; returns its results, on the device.
  std::vector<c10::IValue> run(const std::vector<c10::IValue>& args) const {
    // an empty out= is resized, which an alias cannot be
    std::vector<std::pair<Tensor, Tensor>> resized;
    Stack stack;
    for (size_t i = 0; i < args.size(); i++) {
      bool out = writes(i) && schema.arguments()[i].kwarg_only();
      if (args[i].isDevice())
        stack.push_back(c10::Device(c10::DeviceType::CPU));
      else
        stack.push_back(changed(args[i], [&](const Tensor& tensor) {
          if (!out || !tensor.is_cuda() || tensor.numel()) return host_view(tensor);
          resized.emplace_back(tensor, at::empty({0}, tensor.options().device(at::kCPU)));
          return resized.back().second;
        }));
    }
    {
      at::AutoDispatchBelowAutograd below;
      Inside inside;
      op.callBoxed(&stack);
    }
    for (auto& [tensor, on_cpu] : resized) {
      resize_(tensor, on_cpu.sizes(), std::nullopt);
      if (on_cpu.numel()) write(tensor, on_cpu);
    }
    std::vector<c10::IValue> results;
    for (size_t r = 0; r < stack.size(); r++) {
      int argument = argument_of_result(r);
      auto there = [&](const Tensor& tensor) { return tensor.is_cuda() ? tensor : to_device(tensor, device); };
      results.push_back(argument < 0 ? changed(stack[r], there) : args[argument]);
    }
    return results;
  }

  // Instead of `run`, while a graph is recorded: the results have shapes, but no values until the graph runs. The graph
  // knows addresses, and keeps no tensor alive.
  std::vector<c10::IValue> run_at_replay(const std::vector<c10::IValue>& args) const {
    std::vector<c10::IValue> results, raw_args, raw_results;
    if (!writes_any() || resizes(args)) {
      results = run(args);
      for (const auto& result : results)
        for_each_tensor(result, [](const Tensor& tensor) {
          if (tensor.numel()) scramble(tensor.storage().mutable_data(), tensor.storage().nbytes());
        });
    } else {
      for (size_t r = 0; r < schema.returns().size(); r++) {
        int argument = argument_of_result(r);
        TORCH_CHECK(argument >= 0, "the fake device cannot record ", name);
        results.push_back(args[argument]);
      }
    }
    for (const auto& arg : args)
      raw_args.push_back(arg.isDevice() ? c10::IValue(c10::Device(c10::DeviceType::CPU)) : changed(arg, host_view));
    for (size_t r = 0; r < results.size(); r++)
      raw_results.push_back(argument_of_result(r) < 0 ? changed(results[r], host_view) : c10::IValue());
    record([op = op, raw_args, raw_results] {
      at::AutoDispatchBelowAutograd below;
      Inside inside;
      Stack stack(raw_args);
      op.callBoxed(&stack);
      for (size_t r = 0; r < raw_results.size(); r++) {
        std::vector<Tensor> to, from;
        for_each_tensor(raw_results[r], [&](const Tensor& tensor) { to.push_back(tensor); });
        for_each_tensor(stack[r], [&](const Tensor& tensor) { from.push_back(tensor); });
        for (size_t i = 0; i < to.size(); i++) write(to[i], from[i]);
      }
    });
    return results;
  }

  // Whether a result is to be written to an empty out=.
  bool resizes(const std::vector<c10::IValue>& args) const {
    for (size_t i = 0; i < args.size(); i++)
      if (writes(i) && schema.arguments()[i].kwarg_only() && has_tensor(args[i]) && !args[i].toTensor().numel())
        return true;
    return false;
  }
};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  size_t n = op.schema().arguments().size();
  std::vector<c10::IValue> args(stack->end() - n, stack->end());
  Call call(op, args);
  auto results = capturing() && !Inside::now() ? call.run_at_replay(args) : call.run(args);
  stack->resize(stack->size() - n);
  stack->insert(stack->end(), results.begin(), results.end());
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("resize_", resize_);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", item);
  m.impl("record_stream", record_stream);
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace
}  // namespace fake

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  fake::bind_runtime(m);
  m.def("host_view", &fake::host_view);
}

// Op observe: what decides whether a plan's rows still hold, read off many tensors in one call
// (SPEC.md, "The plan").
#include <vector>

#include "launch.h"

namespace childtune {
namespace {

constexpr int kColumns = 2;  // address, digest of type, device, sizes and strides

uint64_t mixed(uint64_t digest, uint64_t value) {
  digest = (digest ^ value) * 0x9E3779B97F4A7C15u;
  return digest ^ (digest >> 29);
}

void check(AOTITorchError error) { STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "observe: a tensor without strides"); }

void observe_tensor(const Tensor& tensor, int64_t* row) {
  AtenTensorHandle handle = tensor.get();
  int32_t dtype, device_type, device_index;
  int64_t dim;
  int64_t *sizes, *strides;
  void* address;
  check(aoti_torch_get_data_ptr(handle, &address));
  check(aoti_torch_get_dtype(handle, &dtype));
  check(aoti_torch_get_device_type(handle, &device_type));
  check(aoti_torch_get_device_index(handle, &device_index));
  check(aoti_torch_get_dim(handle, &dim));
  check(aoti_torch_get_sizes(handle, &sizes));
  check(aoti_torch_get_strides(handle, &strides));
  uint64_t digest = mixed(uint64_t(dtype) << 32 | uint32_t(device_type), uint64_t(dim) << 32 | uint32_t(device_index));
  for (int64_t at = 0; at < dim; ++at) digest = mixed(mixed(digest, uint64_t(sizes[at])), uint64_t(strides[at]));
  row[0] = reinterpret_cast<int64_t>(address);
  row[1] = int64_t(mixed(digest, address == nullptr));
}

}  // namespace

void observe_(std::vector<Tensor> tensors, Tensor observed) {
  STD_TORCH_CHECK(observed.numel() == int64_t(tensors.size()) * kColumns, "observe: a table of another size");
  int64_t* row = static_cast<int64_t*>(observed.data_ptr());
  for (const Tensor& tensor : tensors) {
    observe_tensor(tensor, row);
    row += kColumns;
  }
}

}  // namespace childtune

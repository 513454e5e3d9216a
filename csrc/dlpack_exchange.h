// DLPack 1's table of C functions, as far as it is used: how the Python object of a tensor is read without
// going through Python. torch's own header of it is closed to extensions that keep to the stable interface.
#pragma once

#include <cstdint>

namespace childtune::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kTypeAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsuleName = "dlpack_exchange_api";

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct View {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t dim;
  DataType dtype;
  const int64_t* sizes;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major_version;
  uint32_t minor_version;
  void* of_older_version;
  void (*unused[3])();
  // Borrows everything from the object, which must be a tensor; may be null; -1 with a Python exception.
  int (*view_of)(void* object, View* view);
  void (*current_stream)();
};

}  // namespace childtune::dlpack

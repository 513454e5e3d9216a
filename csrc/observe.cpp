// Op observe: what decides whether a plan still holds, read off Python's objects in a few calls
// (SPEC.md, "The plan"). A tensor's way through the dispatcher costs four times what reading it costs.
#include "observe.h"

#include <cstring>
#include <memory>

#include "dlpack_exchange.h"
#include "launch.h"

namespace childtune {
namespace {

constexpr const char* kWatchName = "childtune_kernels.watch";

struct Drop {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Drop>;

PyTypeObject* tensor_type;
const dlpack::ExchangeTable* exchange;
PyObject *grad_name, *params_name, *is_neg_name;
PyCFunction is_neg;

uint64_t mixed(uint64_t digest, uint64_t value) {
  digest = (digest ^ value) * 0x9E3779B97F4A7C15u;
  return digest ^ (digest >> 29);
}

struct Look {
  int64_t address;
  int64_t digest;
};

// Of devices that DLPack does not know, as meta: the same by the tensor's own methods.
bool look_by_methods(PyObject* tensor, Look& look) {
  const Owned address{PyObject_CallMethod(tensor, "data_ptr", nullptr)};
  if (!address) return false;
  const Owned dtype{PyObject_GetAttrString(tensor, "dtype")}, device{PyObject_GetAttrString(tensor, "device")},
      sizes{PyObject_GetAttrString(tensor, "shape")}, strides{PyObject_CallMethod(tensor, "stride", nullptr)};
  if (!dtype || !device || !sizes || !strides) return false;
  const Owned all{PyTuple_Pack(4, dtype.get(), device.get(), sizes.get(), strides.get())};
  if (!all) return false;
  look.address = PyLong_AsLongLong(address.get());
  look.digest = int64_t(mixed(uint64_t(PyObject_Hash(all.get())), look.address == 0));
  return PyErr_Occurred() == nullptr;
}

bool look_at(PyObject* object, Look& look) {
  PyTypeObject* const type = Py_TYPE(object);
  if (type != tensor_type && !PyType_IsSubtype(type, tensor_type)) {
    PyErr_SetString(PyExc_TypeError, "observe: an object that is no tensor");
    return false;
  }
  dlpack::View view;
  if (exchange->view_of(object, &view) != 0) {
    PyErr_Clear();
    return look_by_methods(object, look);
  }
  uint32_t dtype;
  static_assert(sizeof(dtype) == sizeof(view.dtype));
  std::memcpy(&dtype, &view.dtype, sizeof(dtype));
  uint64_t digest = mixed(uint64_t(dtype) << 32 | uint32_t(view.device_type),
                          uint64_t(view.dim) << 32 | uint32_t(view.device_index));
  for (int32_t at = 0; at < view.dim; ++at)
    digest = mixed(mixed(digest, uint64_t(view.sizes[at])), uint64_t(view.strides[at]));
  look.address = reinterpret_cast<int64_t>(view.data) + int64_t(view.byte_offset);
  look.digest = int64_t(mixed(digest, view.data == nullptr));
  return true;
}

bool look_at_gradient(PyObject* parameter, Look& look) {
  const Owned gradient{PyObject_GetAttr(parameter, grad_name)};
  if (!gradient) return false;
  look = {0, 0};
  if (gradient.get() == Py_None) return true;
  if (!look_at(gradient.get(), look)) return false;
  const Owned negated{is_neg(gradient.get(), nullptr)};
  if (!negated) return false;
  look.digest = int64_t(mixed(uint64_t(look.digest), negated.get() == Py_True));
  return true;
}

// Tensors whose addresses are read through handles of the stable interface, without their Python objects.
struct Watch {
  std::unique_ptr<std::vector<Tensor>> tensors;
  std::vector<PyObject*> objects;

  ~Watch() {
    for (PyObject* const object : objects) Py_DECREF(object);
  }
};

void delete_watch(PyObject* capsule) { delete static_cast<Watch*>(PyCapsule_GetPointer(capsule, kWatchName)); }

PyObject* new_watch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "watch: a list of tensors and what watch_handles made of it");
    return nullptr;
  }
  auto watch = std::make_unique<Watch>();
  watch->tensors.reset(reinterpret_cast<std::vector<Tensor>*>(PyLong_AsLongLong(arguments[1])));
  if (PyErr_Occurred() != nullptr) return nullptr;
  for (Py_ssize_t at = 0; at < PyList_Size(arguments[0]); ++at) {
    watch->objects.push_back(PyList_GetItem(arguments[0], at));
    Py_INCREF(watch->objects.back());
  }
  PyObject* const capsule = PyCapsule_New(watch.get(), kWatchName, delete_watch);
  if (capsule != nullptr) watch.release();
  return capsule;
}

bool address_of(const Watch& watch, size_t index, PyObject* object, int64_t& address) {
  if (index < watch.objects.size() && watch.objects[index] == object) {
    void* data;
    if (aoti_torch_get_data_ptr((*watch.tensors)[index].get(), &data) == AOTI_TORCH_SUCCESS) {
      address = reinterpret_cast<int64_t>(data);
      return true;
    }
  }
  Look look;
  Py_INCREF(object);
  const Owned held{object};
  if (!look_at(object, look)) return false;
  address = look.address;
  return true;
}

int64_t identity(PyObject* object) { return reinterpret_cast<int64_t>(object); }

// 64-bit values for Python, as a bytes object: what was observed before is compared on the way, and is itself
// the result where nothing has changed, so that nothing is written.
class Table {
 public:
  explicit Table(PyObject* before) : before_(before) {
    if (!PyBytes_Check(before)) return;
    expected_ = PyBytes_AsString(before);
    expected_count_ = size_t(PyBytes_Size(before)) / sizeof(int64_t);
  }
  template <typename... Values>
  void add(Values... values) {
    const int64_t row[] = {int64_t(values)...};
    constexpr size_t kCount = sizeof...(Values);
    if (same_) {
      if (count_ + kCount <= expected_count_ && std::memcmp(expected_ + 8 * count_, row, sizeof(row)) == 0) {
        count_ += kCount;
        return;
      }
      part();
    }
    values_.insert(values_.end(), row, row + kCount);
  }
  // The next values of before, for who compares them himself; null where there are not as many.
  const int64_t* ahead(size_t count) const {
    const bool has = same_ && count_ + count <= expected_count_;
    return has ? reinterpret_cast<const int64_t*>(expected_) + count_ : nullptr;
  }
  void accept(size_t count) { count_ += count; }
  Owned bytes() {
    if (same_ && count_ == expected_count_ && PyBytes_Check(before_)) {
      Py_INCREF(before_);
      return Owned{before_};
    }
    if (same_) part();
    return Owned{PyBytes_FromStringAndSize(reinterpret_cast<const char*>(values_.data()), 8 * Py_ssize_t(values_.size()))};
  }

 private:
  void part() {
    same_ = false;
    values_.reserve(expected_count_);
    values_.resize(count_);
    if (count_ > 0) std::memcpy(values_.data(), expected_, 8 * count_);
  }

  PyObject* before_;
  const char* expected_ = nullptr;
  size_t expected_count_ = 0;
  size_t count_ = 0;
  bool same_ = true;
  std::vector<int64_t> values_;
};

bool is_tuple(PyObject* object, Py_ssize_t count) { return PyTuple_Check(object) && PyTuple_Size(object) == count; }

bool is_tuple_of_dicts(PyObject* object, Py_ssize_t count) {
  if (!is_tuple(object, count)) return false;
  for (Py_ssize_t at = 0; at < count; ++at)
    if (!PyDict_Check(PyTuple_GetItem(object, at))) return false;
  return true;
}

PyObject* observe(PyObject*, PyObject* const* arguments, Py_ssize_t argument_count) {
  if (argument_count != 4 || !PyTuple_Check(arguments[0]) ||
      !is_tuple_of_dicts(arguments[1], PyTuple_Size(arguments[0])) || !is_tuple(arguments[3], 3)) {
    PyErr_SetString(PyExc_TypeError, "observe: tuples of parameters and of their states, a watch, and a triple");
    return nullptr;
  }
  PyObject *const parameters = arguments[0], *const states = arguments[1], *const before = arguments[3];
  const Watch* const watch = static_cast<Watch*>(PyCapsule_GetPointer(arguments[2], kWatchName));
  if (watch == nullptr) return nullptr;
  Table placed(PyTuple_GetItem(before, 0)), looks(PyTuple_GetItem(before, 1)), pointed(PyTuple_GetItem(before, 2));
  size_t watched = 0;
  const Py_ssize_t count = PyTuple_Size(parameters);
  for (Py_ssize_t at = 0; at < count; ++at) {
    PyObject* const parameter = PyTuple_GetItem(parameters, at);
    Look of_parameter, of_gradient;
    if (!look_at(parameter, of_parameter) || !look_at_gradient(parameter, of_gradient)) return nullptr;
    placed.add(of_parameter.address, of_parameter.digest);
    looks.add(of_gradient.digest);
    pointed.add(of_gradient.address);
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(PyTuple_GetItem(states, at), &position, &key, &value)) {
      int64_t address;
      if (!address_of(*watch, watched++, value, address)) return nullptr;
      placed.add(identity(value), address);
    }
  }
  const Owned first = placed.bytes(), second = looks.bytes(), third = pointed.bytes();
  return first && second && third ? PyTuple_Pack(3, first.get(), second.get(), third.get()) : nullptr;
}

// A group's keys and values to options, the parameters of its list to members.
bool add_group(PyObject* group, Table& members, Table& options) {
  PyObject* parameters = nullptr;
  if (PyDict_Check(group)) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    const size_t size = 2 * size_t(PyDict_Size(group));
    const int64_t* expected = options.ahead(size);
    int64_t differences = expected == nullptr;
    while (expected != nullptr && PyDict_Next(group, &position, &key, &value)) {
      differences |= (*expected++ ^ identity(key));
      differences |= (*expected++ ^ identity(value));
      if (key == params_name) parameters = value;
    }
    if (differences == 0) {
      options.accept(size);
    } else {
      for (position = 0; PyDict_Next(group, &position, &key, &value);) options.add(identity(key), identity(value));
    }
    if (parameters == nullptr) parameters = PyDict_GetItemWithError(group, params_name);  // a key not interned
  }
  if (parameters == nullptr || !PyList_Check(parameters)) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_TypeError, "a parameter group is a dict with a list of params");
    return false;
  }
  members.add(identity(group));
  const Py_ssize_t count = PyList_Size(parameters);
  for (Py_ssize_t at = 0; at < count; ++at) members.add(identity(PyList_GetItem(parameters, at)));
  return true;
}

PyObject* observe_groups(PyObject*, PyObject* const* arguments, Py_ssize_t argument_count) {
  if (argument_count != 3 || !PyList_Check(arguments[0]) || !PyDict_Check(arguments[1]) || !is_tuple(arguments[2], 2)) {
    PyErr_SetString(PyExc_TypeError, "observe_groups: the list of groups, the dict of state, and a pair");
    return nullptr;
  }
  PyObject *const groups = arguments[0], *const before = arguments[2];
  Table members(PyTuple_GetItem(before, 0)), options(PyTuple_GetItem(before, 1));
  const Py_ssize_t count = PyList_Size(groups);
  for (Py_ssize_t at = 0; at < count; ++at)
    if (!add_group(PyList_GetItem(groups, at), members, options)) return nullptr;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(arguments[1], &position, &key, &value)) members.add(identity(value));
  const Owned first = members.bytes(), second = options.bytes();
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
}

template <typename Function>
PyCFunction fast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

bool find_is_neg(PyObject* torch) {
  const Owned tensor{PyObject_CallMethod(torch, "empty", "i", 0)};
  const Owned bound{tensor ? PyObject_GetAttr(tensor.get(), is_neg_name) : nullptr};
  if (!bound) return false;
  // Called without the lookup and the bound method, which cost as much as what it does.
  is_neg = PyCFunction_GetFlags(bound.get()) == METH_NOARGS ? PyCFunction_GetFunction(bound.get()) : nullptr;
  if (is_neg == nullptr && PyErr_Occurred() == nullptr)
    is_neg = [](PyObject* self, PyObject*) { return PyObject_CallMethodObjArgs(self, is_neg_name, nullptr); };
  return is_neg != nullptr;
}

}  // namespace

int64_t watch_handles(std::vector<Tensor> tensors) {
  return reinterpret_cast<int64_t>(new std::vector<Tensor>(std::move(tensors)));
}

PyMethodDef observe_methods[] = {
    {"watch", fast(new_watch), METH_FASTCALL, nullptr},
    {"observe", fast(observe), METH_FASTCALL, nullptr},
    {"observe_groups", fast(observe_groups), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

bool prepare_observe() {
  grad_name = PyUnicode_InternFromString("grad");
  params_name = PyUnicode_InternFromString("params");
  is_neg_name = PyUnicode_InternFromString("is_neg");
  const Owned torch{PyImport_ImportModule("torch")};
  PyObject* const type = torch ? PyObject_GetAttrString(torch.get(), "Tensor") : nullptr;
  const Owned capsule{type != nullptr ? PyObject_GetAttrString(type, dlpack::kTypeAttribute) : nullptr};
  if (!capsule) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  exchange = static_cast<dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.get(), dlpack::kCapsuleName));
  if (exchange == nullptr) return false;
  if (exchange->major_version != dlpack::kMajorVersion || exchange->view_of == nullptr) {
    PyErr_SetString(PyExc_ImportError, "this torch lets no tensor be viewed by DLPack 1's table of functions");
    return false;
  }
  return find_is_neg(torch.get());
}

}  // namespace childtune

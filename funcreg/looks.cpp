// The questions of looks.py, asked in C++. Where something is not as expected, the answer is the one after which Python
// looks more closely.
#include <Python.h>
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/UndefinedTensorImpl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace {

PyTypeObject* tensor_type = nullptr;
PyTypeObject* plain_type = nullptr;  // That of most of them.
Py_ssize_t offset = 0;  // From where a tensor begins in Python to its pointer to the TensorImpl.

c10::TensorImpl& tensor(PyObject* x) {
  if (Py_TYPE(x) != plain_type && !PyObject_TypeCheck(x, tensor_type)) throw std::invalid_argument("not a tensor");
  return **reinterpret_cast<c10::TensorImpl**>(reinterpret_cast<char*>(x) + offset);
}

char* address(const c10::TensorImpl& x) {
  if (x.numel() == 0 || !x.has_storage()) return nullptr;
  auto* memory = const_cast<char*>(static_cast<const char*>(x.unsafe_storage().data()));
  return memory + x.itemsize() * x.storage_offset();
}

struct Sequence {
  PyObject** first;
  Py_ssize_t size;

  explicit Sequence(PyObject* x) {
    if (!PyList_Check(x) && !PyTuple_Check(x)) throw std::invalid_argument("neither list nor tuple");
    first = PySequence_Fast_ITEMS(x);
    size = PySequence_Fast_GET_SIZE(x);
  }
};

bool is_same(PyObject* found, PyObject* known, PyObject* others) {
  if (found == known) return true;
  if (known == Py_Ellipsis) return PyList_Append(others, found) == 0;
  if (Py_TYPE(found) != Py_TYPE(known)) return false;
  if (PyDict_CheckExact(known)) {
    PyObject *key, *value, *known_key, *known_value;
    Py_ssize_t i = 0, j = 0;
    while (PyDict_Next(known, &j, &known_key, &known_value)) {
      if (!PyDict_Next(found, &i, &key, &value) || key != known_key) return false;
      if (value != known_value && !is_same(value, known_value, others)) return false;
    }
    return PyDict_Size(found) == PyDict_Size(known);
  }
  if (!PyTuple_Check(known) && !PyList_CheckExact(known)) return false;
  const Sequence a(found), b(known);
  for (Py_ssize_t i = 0; i < b.size; ++i) {
    if (i == a.size || !is_same(a.first[i], b.first[i], others)) return false;
  }
  return a.size == b.size;
}

// Whether the answer for an object, given its number, is yes for one.
template <class Question>
bool any(PyObject* objects, Question question) noexcept {
  try {
    const Sequence all(objects);
    for (Py_ssize_t i = 0; i < all.size; ++i) {
      // Tensors lie anywhere in memory, and are asked for before they are looked at.
      if (i + 16 < all.size) __builtin_prefetch(reinterpret_cast<char*>(all.first[i + 16]) + offset);
      if (i + 8 < all.size) {
        const char* ahead = reinterpret_cast<const char*>(&tensor(all.first[i + 8]));
        for (std::size_t j = 0; j < sizeof(c10::TensorImpl); j += 64) __builtin_prefetch(ahead + j);
      }
      if (question(all.first[i], i)) return true;
    }
    return false;
  } catch (...) {
    return true;
  }
}

bool is_elsewhere(const c10::TensorImpl& x, std::uint64_t known) {
  return reinterpret_cast<std::uint64_t>(address(x)) != known;
}

bool has_gradient(const c10::TensorImpl& x) {
  if (!x.autograd_meta()) return false;
  const at::Tensor& gradient = x.autograd_meta()->grad();  // Which is a pointer; its class is not known here.
  return *reinterpret_cast<c10::TensorImpl* const*>(&gradient) != c10::UndefinedTensorImpl::singleton();
}

// Numbers for all that code for a tensor depends on, but not for where it lies.
template <class Take>
void describe(PyObject* object, Take take) {
  const auto& x = tensor(object);
  take(reinterpret_cast<std::intptr_t>(Py_TYPE(object)));
  take(static_cast<std::int64_t>(x.key_set().raw_repr()));
  take(static_cast<std::int64_t>(c10::typeMetaToScalarType(x.dtype())));
  take(static_cast<std::int64_t>(x.device().type()));
  take(x.device().index());
  take(x.requires_grad());
  take(x.dim());
  for (const auto size : x.sizes()) take(size);
  for (const auto stride : x.strides()) take(stride);
}

bool is_plain(const c10::TensorImpl& x) {
  using c10::DispatchKey;
  const auto keys = x.key_set();
  const bool wrapped = keys.has(DispatchKey::Python) || keys.has(DispatchKey::Functionalize);
  const bool lazy = keys.has(DispatchKey::Negative) || keys.has(DispatchKey::Conjugate);
  return !wrapped && !lazy && x.is_contiguous() && x.device().is_cpu();
}

}  // namespace

extern "C" {

void begin(PyObject* base, PyObject* plain, Py_ssize_t to_impl) {
  tensor_type = reinterpret_cast<PyTypeObject*>(base);
  plain_type = reinterpret_cast<PyTypeObject*>(plain);
  offset = to_impl;
}

bool same(PyObject* found, PyObject* known) {
  try {
    const Sequence a(found), b(known);
    return a.size == b.size && std::equal(a.first, a.first + a.size, b.first);
  } catch (...) {
    return false;
  }
}

bool same_tree(PyObject* found, PyObject* known, PyObject* others) { return is_same(found, known, others); }

bool moved(PyObject* tensors, const std::uint64_t* known, Py_ssize_t first) {
  return any(tensors, [=](PyObject* object, Py_ssize_t i) {
    const auto& x = tensor(object);
    return is_elsewhere(x, known[i]) || (i < first && !x.is_contiguous());
  });
}

bool need_gradient(PyObject* tensors) {
  return any(tensors, [](PyObject* x, Py_ssize_t) { return tensor(x).requires_grad(); });
}

bool begin_inside(PyObject* tensors, const std::uint64_t* spans, Py_ssize_t count) {
  return any(tensors, [=](PyObject* x, Py_ssize_t) {
    const auto at = reinterpret_cast<std::uint64_t>(address(tensor(x)));
    for (Py_ssize_t i = 0; i < count; i += 2) {
      if (spans[i] <= at && at < spans[i + 1]) return true;
    }
    return false;
  });
}

// Writes the numbers for which there is room, and returns how many there are, or -1.
Py_ssize_t described(PyObject* tensors, std::int64_t* out, Py_ssize_t room) {
  Py_ssize_t count = 0;
  const bool failed = any(tensors, [&](PyObject* x, Py_ssize_t) {
    describe(x, [&](std::int64_t number) {
      if (count++ < room) *out++ = number;
    });
    return false;
  });
  return failed ? -1 : count;
}

bool alike(PyObject* tensors, const std::int64_t* known, Py_ssize_t count) {
  const auto* const end = known + count;
  const bool differ = any(tensors, [&](PyObject* x, Py_ssize_t) {
    bool differs = false;
    describe(x, [&](std::int64_t number) { differs = differs || known == end || *known++ != number; });
    return differs;
  });
  return !differ && known == end;
}

bool held(PyObject* tensors, const std::uint64_t* known, Py_ssize_t first, std::int64_t* out) {
  return !any(tensors, [=](PyObject* object, Py_ssize_t i) {
    auto& x = tensor(object);
    out[0] += Py_REFCNT(object);
    out[1] += static_cast<std::int64_t>(c10::raw::intrusive_ptr::use_count(&x));
    out[2] |= is_elsewhere(x, known[i]) || x.requires_grad() || (i < first && (!x.is_contiguous() || has_gradient(x)));
    return false;
  });
}

bool join(PyObject* tensors, PyObject* target) {
  try {
    const auto& out = tensor(target);
    char* to = address(out);
    char* const end = to + out.numel() * out.itemsize();
    const bool unfit = !is_plain(out) || any(tensors, [&](PyObject* object, Py_ssize_t) {
      const auto& x = tensor(object);
      const auto bytes = static_cast<std::ptrdiff_t>(x.numel() * x.itemsize());
      const char* from = address(x);
      if (!is_plain(x) || x.dtype() != out.dtype() || bytes > end - to || (bytes && !from)) return true;
      if (bytes) std::memcpy(to, from, bytes);
      to += bytes;
      return false;
    });
    return !unfit && to == end;
  } catch (...) {
    return false;
  }
}

}  // extern "C"

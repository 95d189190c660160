#pragma once
// What a bridge asks of its arguments before it hands their memory to csrc, which trusts every pointer and size: a raw op can
// be called with anything.
#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace vlmk {

// A closed list of dtypes.
class DTypes {
 public:
  constexpr DTypes(at::ScalarType type) : bits_(uint64_t(1) << static_cast<int>(type)) {}
  constexpr DTypes(std::initializer_list<at::ScalarType> types) : bits_(0) {
    for (const at::ScalarType type : types) bits_ |= DTypes(type).bits_;
  }
  constexpr bool has(at::ScalarType type) const { return bits_ >> static_cast<int>(type) & 1; }

 private:
  static_assert(static_cast<int>(at::ScalarType::NumOptions) <= 64);
  uint64_t bits_;
};
// What the kernels are made for.
inline constexpr DTypes kFloats{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
inline constexpr DTypes kInts{at::kInt, at::kLong};

// What sizes may leave open: one dimension, and in front any number of dimensions.
inline constexpr int64_t kAny = -1, kLeading = -2;

// The sizes of a result or an addend with as many rows.
inline c10::DimVector with_last(at::IntArrayRef sizes, int64_t last) {
  c10::DimVector other(sizes.begin(), sizes.end());
  other.back() = last;
  return other;
}

// Refuses arguments of an op with a ValueError that names them, what they are and what they must be.
class Need {
 public:
  explicit Need(const char* op, c10::Device device = at::kCPU) : op_(op), device_(device) {}

  // A strided tensor here of these sizes and one of these dtypes, that lies in its memory and is aligned to its dtype.
  void tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes, DTypes types) const {
    if (C10_UNLIKELY(!is(t, sizes, types))) refuse_tensor(name, t, sizes, types);
  }
  void tensor(const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef sizes, DTypes types) const {
    if (t) tensor(name, *t, sizes, types);
  }
  // One that is read as contiguous memory.
  void contiguous(const char* name, const at::Tensor& t, at::IntArrayRef sizes, DTypes types) const {
    tensor(name, t, sizes, types);
    that(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides());
  }
  void scalar(const char* name, const at::Tensor& t) const {
    tensor(name, t, kLeading, kFloats);
    that(t.numel() == 1, name, " must have one element, got sizes ", t.sizes());
  }
  // One element or one for each of `count` channels.
  void gate(const char* name, const at::Tensor& t, int64_t count) const {
    tensor(name, t, kLeading, kFloats);
    that(t.numel() == 1 || t.numel() == count, name, " must have 1 or ", count, " elements, got sizes ", t.sizes());
  }
  // [count] of indices in [0, end), or -1.
  void indices(const char* name, const at::Tensor& t, int64_t count, int64_t end) const {
    tensor(name, t, count, at::kLong);
    if (count == 0) return;
    const int64_t *index = static_cast<const int64_t*>(t.const_data_ptr()), step = t.stride(0);
    int64_t low = *index, high = *index;
    for (int64_t i = 1; i < (step ? count : 1); ++i) {
      low = std::min(low, index[i * step]);
      high = std::max(high, index[i * step]);
    }
    that(low >= -1 && high < end, name, " must be in [0, ", end, ") or -1, got values from ", low, " to ", high);
  }
  // Of x [..., *].
  int64_t rows(const at::Tensor& x) const { return product(x.sizes().slice(0, x.dim() - 1)); }
  // Numbers of bytes in buffers of these sizes, rounded up to blocks, do not overflow.
  void countable(at::IntArrayRef sizes) const {
    constexpr int64_t block = 4096;
    product(sizes, block);
  }
  // Of sizes, which does not overflow.
  int64_t product(at::IntArrayRef sizes, int64_t extra = 0) const {
    constexpr int64_t most = int64_t(1) << 58;
    int64_t product = 1;
    bool fits = true;
    for (const int64_t size : sizes) {
      fits &= size < most && !__builtin_mul_overflow(product, size + extra, &product) && product < most;
    }
    that(fits, "sizes of ", sizes, " are too large for one call");
    return product;
  }
  template <class... Words>
  void that(bool holds, const Words&... words) const {
    if (C10_UNLIKELY(!holds)) refuse(words...);
  }
  template <class... Words>
  [[noreturn]] C10_NOINLINE void refuse(const Words&... words) const {
    C10_THROW_ERROR(ValueError, c10::str(op_, ": ", words...));
  }

 private:
  static bool has_sizes(at::IntArrayRef got, at::IntArrayRef wanted) {
    if (!wanted.empty() && wanted[0] == kLeading) {
      wanted = wanted.slice(1);
      if (got.size() < wanted.size()) return false;
      got = got.slice(got.size() - wanted.size());
    }
    if (got.size() != wanted.size()) return false;
    for (size_t i = 0; i < got.size(); ++i) {
      if (wanted[i] != kAny && got[i] != wanted[i]) return false;
    }
    return true;
  }
  static bool plain(const at::Tensor& t) {
    return t.defined() && !t.is_nested() && t.layout() == at::kStrided && t.has_storage();
  }
  static bool lies_in_memory(const at::Tensor& t) {
    if (t.numel() == 0) return true;
    int64_t end = t.storage_offset() + 1;
    for (int64_t i = 0; i < t.dim(); ++i) end += (t.size(i) - 1) * t.stride(i);
    return static_cast<size_t>(end) * t.itemsize() <= t.storage().nbytes();
  }
  static bool aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.itemsize() == 0; }
  bool is(const at::Tensor& t, at::IntArrayRef sizes, DTypes types) const {
    return plain(t) && t.device() == device_ && types.has(t.scalar_type()) && has_sizes(t.sizes(), sizes) &&
           lies_in_memory(t) && aligned(t);
  }

  static std::string name_of(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }
  static std::string shown(at::IntArrayRef sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); ++i) {
      text += i ? ", " : "";
      text += sizes[i] == kAny ? "*" : sizes[i] == kLeading ? "..." : std::to_string(sizes[i]);
    }
    return text + "]";
  }
  static std::string shown(const at::Tensor& t) {
    if (!t.defined()) return "an undefined tensor";
    if (t.is_nested()) return "a nested tensor";
    if (!plain(t)) return c10::str("a tensor of layout ", t.layout());
    std::string text = c10::str(name_of(t.scalar_type()), " ", shown(t.sizes()), " on ", t.device());
    if (!t.device().is_meta() && !lies_in_memory(t)) return text + ", beyond the end of its storage";
    return t.device().is_meta() || aligned(t) ? text : text + ", not aligned to its dtype";
  }
  [[noreturn]] C10_NOINLINE void refuse_tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes,
                                               DTypes types) const {
    std::string wanted;
    for (int type = 0; type < static_cast<int>(at::ScalarType::NumOptions); ++type) {
      if (!types.has(static_cast<at::ScalarType>(type))) continue;
      wanted += (wanted.empty() ? "" : " or ") + name_of(static_cast<at::ScalarType>(type));
    }
    refuse(name, " must be a strided tensor ", shown(sizes), " of ", wanted, " on ", device_, ", got ", shown(t));
  }

  const char* op_;
  c10::Device device_;
};

}  // namespace vlmk

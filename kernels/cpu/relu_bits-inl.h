// Bits of kReLU (norm_input.h) of a unit, from and to a run's, which starts with a whole byte. Per-target
// code: included once for each instruction set.
#if defined(NORMCORE_KERNELS_CPU_RELU_BITS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_RELU_BITS_INL_H_
#undef NORMCORE_KERNELS_CPU_RELU_BITS_INL_H_
#else
#define NORMCORE_KERNELS_CPU_RELU_BITS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {

template <class T>
inline constexpr int kPerReluByte = 16 / sizeof(T);

// Words of 1, 2 or 4 bytes. Stores and loads are of the same size, or the processor could not pass them on.
template <class Word>
HWY_INLINE std::uint32_t load_word(const std::uint8_t* p) {
  Word word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}
HWY_INLINE std::uint32_t load_word(const std::uint8_t* p, std::int64_t bytes) {
  if (bytes == 1) return *p;
  return bytes == 2 ? load_word<std::uint16_t>(p) : load_word<std::uint32_t>(p);
}

// Those of `count` elements from `at` on, as they lie in memory: whole bytes, or a part of one. A byte has
// kPerByte of them, 4 or 8.
template <int kPerByte>
class ReluBits {
 public:
  HWY_INLINE static std::uint32_t load(const std::uint8_t* run, std::int64_t at,
                                       std::int64_t count) {
    const std::uint8_t* const from = run + at / kPerByte;
    if (count < kPerByte) return std::uint32_t{*from} >> at % kPerByte;
    return load_word(from, count / kPerByte);
  }

  HWY_INLINE static void store(std::uint32_t word, std::uint8_t* run, std::int64_t at,
                               std::int64_t count) {
    std::uint8_t* const to = run + at / kPerByte;
    if (count < kPerByte) {  // parts come in order, the first of them clears the byte
      const auto shift = static_cast<unsigned>(at % kPerByte);
      const std::uint32_t before = *to & ((1u << shift) - 1u);
      *to = static_cast<std::uint8_t>(before | word << shift);
    } else {
      std::memcpy(to, &word, static_cast<std::size_t>(count / kPerByte));
    }
  }

  // Where the bit of an element lies in a word that starts with a byte.
  template <class V>
  HWY_INLINE static V position(V element) {
    if constexpr (kPerByte == 8) return element;
    const hn::DFromV<V> d;
    const auto in_byte = hn::And(element, hn::Set(d, 3));
    return hn::Add(hn::ShiftLeft<1>(hn::Sub(element, in_byte)), in_byte);
  }
  // The word of neighbouring bits, at most 16 if there are gaps.
  HWY_INLINE static std::uint32_t with_gaps(std::uint32_t bits) {
    if constexpr (kPerByte == 8) return bits;
    bits = (bits | bits << 8) & 0x00ff00ffu;
    return (bits | bits << 4) & 0x0f0f0f0fu;
  }
};

// Where the derivative of kReLU is 1.
HWY_INLINE PairMask<float> is_active(const Pair<float>& z) {
  const auto zero = hn::Zero(Tag<float>());
  return {hn::Not(hn::Le(z.lo, zero)), hn::Not(hn::Le(z.hi, zero))};
}

// Of a vector whose lanes are the elements first, first + 2^kShift, ... of a word.
template <int kPerByte, int kShift = 0>
HWY_INLINE hn::Mask<Tag<float>> test_bits(std::uint32_t word, std::uint32_t first = 0) {
  const hn::RebindToUnsigned<Tag<float>> d;
  const auto element = hn::Add(hn::ShiftLeft<kShift>(hn::Iota(d, 0u)), hn::Set(d, first));
  const auto bit = hn::Shl(hn::Set(d, 1u), ReluBits<kPerByte>::position(element));
  return hn::RebindMask(Tag<float>(), hn::TestBit(hn::Set(d, word), bit));
}

// The bits of a mask's lanes, the first in the lowest.
template <class D>
HWY_INLINE std::uint32_t bits_of(D d, hn::Mask<D> mask) {
  std::uint8_t bytes[8];
  return load_word(bytes, static_cast<std::int64_t>(hn::StoreMaskBits(d, mask, bytes)));
}

template <int kPerByte, Order kOrder>
HWY_INLINE PairMask<float> load_relu_bits(const WholeUnit<float, kOrder>& u,
                                          const std::uint8_t* run) {
  using Bits = ReluBits<kPerByte>;
  if constexpr (kOrder == Order::kEvenOdd) {
    static_assert(kPerByte == 8);  // the bits of a unit fit a word
    const std::uint32_t word = Bits::load(run, u.at, unit<float>());
    return {test_bits<kPerByte, 1>(word, 0), test_bits<kPerByte, 1>(word, 1)};
  } else {
    const auto n = lanes<float>();
    return {test_bits<kPerByte>(Bits::load(run, u.at, n)),
            test_bits<kPerByte>(Bits::load(run, u.at + n, n))};
  }
}

template <int kPerByte, Order kOrder>
HWY_INLINE void store_relu_bits(const WholeUnit<float, kOrder>& u, const PairMask<float>& mask,
                                std::uint8_t* run) {
  using Bits = ReluBits<kPerByte>;
  const Tag<float> d;
#if HWY_TARGET != HWY_SCALAR  // which has no such order
  if constexpr (kOrder == Order::kEvenOdd) {
    const hn::RebindToUnsigned<Tag<float>> du;
    const hn::Repartition<std::uint16_t, Tag<float>> d16;
    const auto low_half = hn::Set(du, 0xffffu);
    const auto lo = hn::BitCast(du, hn::VecFromMask(d, mask.lo)),
               hi = hn::BitCast(du, hn::VecFromMask(d, mask.hi));
    const auto both = hn::BitCast(d16, hn::Or(hn::And(low_half, lo), hn::AndNot(low_half, hi)));
    return Bits::store(bits_of(d16, hn::MaskFromVec(both)), run, u.at, unit<float>());
  }
#endif
  const auto n = lanes<float>();
  Bits::store(Bits::with_gaps(bits_of(d, mask.lo)), run, u.at, n);
  Bits::store(Bits::with_gaps(bits_of(d, mask.hi)), run, u.at + n, n);
}

template <int kPerByte, Order kOrder>
HWY_INLINE PairMask<float> load_relu_bits(const LastUnit<float, kOrder>& u,
                                          const std::uint8_t* run) {
  using Whole = WholeUnit<float, kOrder>;
  if (u.count == unit<float>()) return load_relu_bits<kPerByte>(Whole{u.at}, run);
  std::uint8_t buffer[2 * HWY_MAX_BYTES / sizeof(float)] = {};
  std::memcpy(buffer, run, static_cast<std::size_t>(u.count / kPerByte));
  return load_relu_bits<kPerByte>(Whole{0}, buffer);
}

template <int kPerByte, Order kOrder>
HWY_INLINE void store_relu_bits(const LastUnit<float, kOrder>& u, const PairMask<float>& mask,
                                std::uint8_t* run) {
  using Whole = WholeUnit<float, kOrder>;
  if (u.count == unit<float>()) return store_relu_bits<kPerByte>(Whole{u.at}, mask, run);
  std::uint8_t buffer[2 * HWY_MAX_BYTES / sizeof(float)] = {};
  store_relu_bits<kPerByte>(Whole{0}, mask, buffer);
  std::memcpy(run, buffer, static_cast<std::size_t>(u.count / kPerByte));
}

template <int kPerByte>
HWY_INLINE PairMask<float> load_relu_bits(const LastVector<float>& u, const std::uint8_t* run) {
  const auto mask = test_bits<kPerByte>(ReluBits<kPerByte>::load(run, u.at, lanes<float>()));
  return {mask, mask};
}

template <int kPerByte>
HWY_INLINE void store_relu_bits(const LastVector<float>& u, const PairMask<float>& mask,
                                std::uint8_t* run) {
  using Bits = ReluBits<kPerByte>;
  Bits::store(Bits::with_gaps(bits_of(Tag<float>(), mask.lo)), run, u.at, lanes<float>());
}

// Whether all units of a run at `p` that is streamed to begin at whole bytes.
template <class T>
HWY_INLINE bool streams_whole_relu_bytes(const T* p) {
  return values_to_alignment(p) % kPerReluByte<T> == 0;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

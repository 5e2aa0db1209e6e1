// Vectors of one SIMD level: loads, sums, exp, log, and the conversions of the points' dtypes.
//
// This header and all that include it are compiled once per level, each time inside the namespace OTKERN_LEVEL, so
// that the linker can never merge a function compiled for AVX-512 with its baseline twin. For the same reason no
// standard library template is used here. GCC's vector extensions carry the code to every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "call.h"

#ifndef OTKERN_LEVEL
#error "compile with -DOTKERN_LEVEL=<name of the SIMD level>"
#endif

#define OTKERN_INLINE inline __attribute__((always_inline))

namespace otkern {
namespace OTKERN_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 vector registers
#else
constexpr bool kManyRegisters = false;  // 16
#endif

// The rows of a matrix in scratch come in groups of four: the group is the unit of every loop over rows.
constexpr int kGroup = 4;

template <class T>
struct Simd;

template <>
struct Simd<float> {
    static constexpr int width = kVectorBytes / 4;
    typedef float Vector __attribute__((vector_size(kVectorBytes)));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef float Four __attribute__((vector_size(16)));
    typedef float FourUnaligned __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t Int;
};

template <>
struct Simd<double> {
    static constexpr int width = kVectorBytes / 8;
    typedef double Vector __attribute__((vector_size(kVectorBytes)));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef double Four __attribute__((vector_size(32)));
    typedef double FourUnaligned __attribute__((vector_size(32), aligned(8), may_alias));
    typedef int64_t Int;
};

template <class T>
using Vec = typename Simd<T>::Vector;
template <class T>
using Bits = typename Simd<T>::Bits;

template <class T>
constexpr T infinity() {
    return T(__builtin_inff());
}

// The least number that vlog takes, and one that can still be summed.
template <class T>
constexpr T tiny() {
    return sizeof(T) == 4 ? T(1.2e-38) : T(2.3e-308);
}
template <class T>
constexpr T huge() {
    return sizeof(T) == 4 ? T(1e37) : T(1e307);
}

template <class T>
OTKERN_INLINE Vec<T> load(const T *p) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned *>(p);
}

template <class T>
OTKERN_INLINE void store(T *p, Vec<T> v) {
    *reinterpret_cast<typename Simd<T>::Unaligned *>(p) = v;
}

// Stores past the caches, for whole aligned cache lines that nobody reads soon: saves reading them first. `fence` must
// follow before another thread is told that the data is there.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr bool kCanStream = true;
#if defined(__clang__)
OTKERN_INLINE void stream(float *p, Vec<float> v) {
    __builtin_nontemporal_store(v, reinterpret_cast<Vec<float> *>(p));
}
OTKERN_INLINE void stream(double *p, Vec<double> v) {
    __builtin_nontemporal_store(v, reinterpret_cast<Vec<double> *>(p));
}
#elif defined(__AVX512F__)
OTKERN_INLINE void stream(float *p, Vec<float> v) {
    __builtin_ia32_movntps512(p, v);
}
OTKERN_INLINE void stream(double *p, Vec<double> v) {
    __builtin_ia32_movntpd512(p, v);
}
#else
OTKERN_INLINE void stream(float *p, Vec<float> v) {
    __builtin_ia32_movntps256(p, v);
}
OTKERN_INLINE void stream(double *p, Vec<double> v) {
    __builtin_ia32_movntpd256(p, v);
}
#endif
OTKERN_INLINE void fence() {
    __builtin_ia32_sfence();
}
#else
constexpr bool kCanStream = false;
template <class T>
OTKERN_INLINE void stream(T *p, Vec<T> v) {
    store(p, v);
}
OTKERN_INLINE void fence() {}
#endif

template <class T>
OTKERN_INLINE typename Simd<T>::Four load_four(const T *p) {
    return *reinterpret_cast<const typename Simd<T>::FourUnaligned *>(p);
}

template <class T>
OTKERN_INLINE void store_four(T *p, typename Simd<T>::Four v) {
    *reinterpret_cast<typename Simd<T>::FourUnaligned *>(p) = v;
}

template <class T>
OTKERN_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};  // x - 0 keeps the sign of a zero
}

template <class T>
OTKERN_INLINE Vec<T> select(Bits<T> mask, Vec<T> yes, Vec<T> no) {
    return (Vec<T>)(((Bits<T>)yes & mask) | ((Bits<T>)no & ~mask));
}

// Like the instruction: the second operand where the comparison is false, so a NaN in `x` is dropped.
template <class T>
OTKERN_INLINE Vec<T> vmax(Vec<T> x, Vec<T> y) {
    return select<T>(x > y, x, y);
}

template <class T>
OTKERN_INLINE Vec<T> vmin(Vec<T> x, Vec<T> y) {
    return select<T>(x < y, x, y);
}

template <class T>
OTKERN_INLINE T maximum(T x, T y) {
    return x > y ? x : y;
}

template <class T>
OTKERN_INLINE T minimum(T x, T y) {
    return x < y ? x : y;
}

OTKERN_INLINE float square_root(float x) {
    return __builtin_sqrtf(x);
}
OTKERN_INLINE double square_root(double x) {
    return __builtin_sqrt(x);
}

// ---- sums of several accumulators at once -------------------------------------------------------------------

// `x` and `y` each hold width / run sums spread over `run` lanes. The result holds those of both, x's first, each
// over run / 2 lanes; lane k of the lower operand comes from:
constexpr int folded_lane(int k, int run, int width) {
    return k < width / 2 ? k / (run / 2) * run + k % (run / 2)
                         : width + (k - width / 2) / (run / 2) * run + (k - width / 2) % (run / 2);
}

template <int... K>
struct Lanes {};
template <int N, int... K>
struct CountLanes : CountLanes<N - 1, N - 1, K...> {};
template <int... K>
struct CountLanes<0, K...> {
    typedef Lanes<K...> type;
};

// The lower and the upper half of every run.
template <class T, int Run, int Offset, int... K>
OTKERN_INLINE Vec<T> halves(Vec<T> x, Vec<T> y, Lanes<K...>) {
    constexpr int width = Simd<T>::width;
#if defined(__clang__)
    return __builtin_shufflevector(x, y, folded_lane(K, Run, width) + Offset...);
#else
    return __builtin_shuffle(x, y, Bits<T>{folded_lane(K, Run, width) + Offset...});
#endif
}

template <class T, int Run>
OTKERN_INLINE Vec<T> fold(Vec<T> x, Vec<T> y) {
    typedef typename CountLanes<Simd<T>::width>::type All;
    return halves<T, Run, 0>(x, y, All()) + halves<T, Run, Run / 2>(x, y, All());
}

// Lane k of the result is the sum of the lanes of acc[k % Count]. Count is a power of two, at most the width.
template <class T, int Count, int Run>
struct SumLanes {
    static OTKERN_INLINE Vec<T> of(const Vec<T> *acc) {
        constexpr int half = Count > 1 ? Count / 2 : 1;
        Vec<T> pairs[half];
        if (Count > 1) {
            for (int k = 0; k < half; ++k) pairs[k] = fold<T, Run>(acc[2 * k], acc[2 * k + (Count > 1)]);
        } else {
            pairs[0] = fold<T, Run>(acc[0], acc[0]);
        }
        return SumLanes<T, half, Run / 2>::of(pairs);
    }
};
template <class T, int Count>
struct SumLanes<T, Count, 1> {
    static OTKERN_INLINE Vec<T> of(const Vec<T> *acc) { return acc[0]; }
};

template <class T, int Count>
OTKERN_INLINE Vec<T> sum_lanes(const Vec<T> *acc) {
    return SumLanes<T, Count, Simd<T>::width>::of(acc);
}

template <class T>
OTKERN_INLINE T horizontal_sum(Vec<T> v) {
    return sum_lanes<T, 1>(&v)[0];
}

template <class T, int Run = Simd<T>::width>
OTKERN_INLINE T horizontal_max(Vec<T> v) {
    typedef typename CountLanes<Simd<T>::width>::type All;
    if constexpr (Run == 1)
        return v[0];
    else
        return horizontal_max<T, Run / 2>(
            vmax<T>(halves<T, Run, 0>(v, v, All()), halves<T, Run, Run / 2>(v, v, All())));
}

// ---- exp and log -----------------------------------------------------------------------------------------------

template <class T>
struct Exponential;
template <>
struct Exponential<float> {
    static constexpr int terms = 7, mantissa = 23, bias = 127;
    static constexpr float lowest = -87.3f, highest = 88.7f, shifter = 12582912.0f;  // 1.5 * 2^23
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Exponential<double> {
    static constexpr int terms = 13, mantissa = 52, bias = 1023;
    static constexpr double lowest = -708.3, highest = 709.7, shifter = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};

// exp(x) to about one unit in the last place; 0 below the normal range (-inf too), the largest power above it.
// x = k ln 2 + r with |r| <= ln 2 / 2, then the Taylor series of exp(r), whose first term left out is below the
// rounding, times 2^k in two factors, because 2^128 has no float.
template <class T>
OTKERN_INLINE Vec<T> bounded_exp(Vec<T> x) {
    typedef Exponential<T> E;
    typedef typename Simd<T>::Int Int;
    constexpr T factorial[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};
    const Vec<T> low = splat<T>(E::lowest), high = splat<T>(E::highest);
    const Bits<T> vanishes = x < low;
    x = vmin<T>(vmax<T>(x, low), high);
    const Vec<T> shifted = x * T(1.44269504088896340736) + E::shifter;
    const Vec<T> k = shifted - E::shifter;
    const Vec<T> r = (x - k * E::ln2_high) - k * E::ln2_low;
    Vec<T> p = splat<T>(1 / factorial[E::terms]);
    for (int i = E::terms - 1; i >= 0; --i) p = p * r + 1 / factorial[i];
    const Bits<T> power = (Bits<T>)shifted - (Bits<T>)splat<T>(E::shifter);
    const Bits<T> half = power >> 1;
    const Bits<T> first = (half + Int(E::bias)) << E::mantissa;
    const Bits<T> second = (power - half + Int(E::bias)) << E::mantissa;
    p = p * (Vec<T>)first * (Vec<T>)second;
    return (Vec<T>)((Bits<T>)p & ~vanishes);
}

// The same, and inf above the normal range.
template <class T>
OTKERN_INLINE Vec<T> vexp(Vec<T> x) {
    return select<T>(x > splat<T>(Exponential<T>::highest), splat(infinity<T>()), bounded_exp<T>(x));
}

template <class T>
struct Logarithm;
template <>
struct Logarithm<float> {
    static constexpr int terms = 5;
    static constexpr int32_t sqrt_half = 0x3f3504f3;
};
template <>
struct Logarithm<double> {
    static constexpr int terms = 11;
    static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcdLL;
};

// log(x) of a positive normal x: x = 2^k m with m in [sqrt(1/2), sqrt(2)), and with s = (m - 1) / (m + 1)
// log m = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| < 0.172.
template <class T>
OTKERN_INLINE Vec<T> vlog(Vec<T> x) {
    typedef Exponential<T> E;
    typedef typename Simd<T>::Int Int;
    const Bits<T> offset = (Bits<T>)x - Int(Logarithm<T>::sqrt_half);
    const Bits<T> k = offset >> E::mantissa;
    const Vec<T> m = (Vec<T>)((Bits<T>)x - (k << E::mantissa));
    const Vec<T> s = (m - 1) / (m + 1), s2 = s * s;
    Vec<T> p = splat<T>(T(1) / (2 * Logarithm<T>::terms + 1));
    for (int i = Logarithm<T>::terms - 1; i >= 1; --i) p = p * s2 + T(1) / (2 * i + 1);
    const Vec<T> twice = s + s;
    const Vec<T> exponent = __builtin_convertvector(k, Vec<T>);
    return exponent * E::ln2_high + (exponent * E::ln2_low + (twice + twice * s2 * p));
}

template <class T>
OTKERN_INLINE T log_of(T x) {
    return vlog<T>(splat(x))[0];
}

// ---- the points' dtypes ----------------------------------------------------------------------------------------

OTKERN_INLINE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

OTKERN_INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

OTKERN_INLINE double to_compute(double x) {
    return x;
}
OTKERN_INLINE float to_compute(float x) {
    return x;
}
OTKERN_INLINE float to_compute(BFloat16 x) {
    return float_of_bits(uint32_t(x.bits) << 16);
}
OTKERN_INLINE float to_compute(Half x) {
    // The exponent is rebiased by a multiplication with 2^112, which also normalises subnormals.
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    return float_of_bits((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

OTKERN_INLINE void from_compute(double x, double *out) {
    *out = x;
}
OTKERN_INLINE void from_compute(float x, float *out) {
    *out = x;
}
// Both round to nearest even and keep inf and NaN.
OTKERN_INLINE void from_compute(float x, BFloat16 *out) {
    const uint32_t bits = bits_of_float(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
OTKERN_INLINE void from_compute(float x, Half *out) {
    const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // Subnormal results: adding 0.5 aligns the last bit of the sum with the last bit of a subnormal half.
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    if (magnitude >= 0x477ff000u) result = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    out->bits = uint16_t(result | sign);
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern

// Vectors of channels: memory, and arithmetic that lets NaN pass through. GCC and Clang vector extensions.
//
// T is the type computed in (float or double), IO the type stored in memory (T or bf16).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

struct bf16 { uint16_t bits; };
template <class T> using vec __attribute__((vector_size(VECTOR_BYTES))) = T;
template <class T> constexpr int W = VECTOR_BYTES / sizeof(T);

template <class T> struct Buffer {  // std::vector drops a vector type's alignment
  size_t size; vec<T>* data;
  explicit Buffer(size_t n) : size(n), data((vec<T>*)std::aligned_alloc(VECTOR_BYTES, n * VECTOR_BYTES)) { zero(); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  vec<T>& operator[](size_t i) { return data[i]; }
  void zero() { std::memset(data, 0, size * VECTOR_BYTES); }
};

// ---- memory ----------------------------------------------------------------------------------------------------
template <class T> vec<T> load_whole(const T* p) { vec<T> v; std::memcpy(&v, p, sizeof v); return v; }
template <class T> vec<T> load_whole(const bf16* p) {
  typedef uint16_t half_vec __attribute__((vector_size(VECTOR_BYTES / 2)));
  half_vec h; std::memcpy(&h, p, sizeof h);
  return (vec<T>)(__builtin_convertvector(h, vec<uint32_t>) << 16);
}
template <class T> void store_whole(T* p, vec<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> void store_whole(bf16* p, vec<T> v) {
  typedef uint16_t half_vec __attribute__((vector_size(VECTOR_BYTES / 2)));
  vec<uint32_t> b = (vec<uint32_t>)v;
  vec<uint32_t> rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest, ties to even
  vec<uint32_t> result = (v == v) ? rounded : (rounded * 0 + 0x7fc0);
  half_vec h = __builtin_convertvector(result, half_vec); std::memcpy(p, &h, sizeof h);
}
// `n` < W only in the last vector of a row whose length is no multiple of the vector's.
template <class T, class IO> vec<T> load(const IO* p, int n) {
  if (n == W<T>) return load_whole<T>(p);
  IO whole[W<T>] = {}; std::memcpy(whole, p, n * sizeof(IO));
  return load_whole<T>(whole);
}
template <class T, class IO> void store(IO* p, vec<T> v, int n) {
  if (n == W<T>) return store_whole<T>(p, v);
  IO whole[W<T>]; store_whole<T>(whole, v); std::memcpy(p, whole, n * sizeof(IO));
}
// The same of numbers that lie `stride` apart.
template <class T> vec<T> gather(const T* p, int64_t stride, int n) {
  if (stride == 1) return load<T>(p, n);
  vec<T> v = {}; for (int i = 0; i < n; i++) v[i] = p[i * stride];
  return v;
}
template <class T> void scatter(T* p, vec<T> v, int64_t stride, int n) {
  if (stride == 1) return store<T>(p, v, n);
  for (int i = 0; i < n; i++) p[i * stride] = v[i];
}
inline float scalar(float x) { return x; }
inline double scalar(double x) { return x; }
inline float scalar(bf16 x) { uint32_t b = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &b, 4); return f; }

// ---- arithmetic: comparisons are written so that NaN passes through ------------------------------------------------
inline vec<double> exp(vec<double> x) { for (int i = 0; i < W<double>; i++) x[i] = std::exp(x[i]); return x; }
inline vec<float> exp(vec<float> x) {  // Cephes' expf: at most 2 ulp over the whole range
  x = x < -87.f ? x * 0 - 87.f : x; x = x > 88.f ? x * 0 + 88.f : x;
  const float shift = 12582912.f;  // 1.5·2^23: adding it rounds to an integer
  vec<float> t = x * 1.44269504f + shift, n = t - shift;
  vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f; p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * (vec<float>)(((vec<int32_t>)t - 0x4b400000 + 127) << 23);
}
template <class T> vec<T> sigmoid(vec<T> x) { return 1 / (1 + exp(-x)); }
template <class T> T sum(vec<T> v) { T s = 0; for (int i = 0; i < W<T>; i++) s += v[i]; return s; }

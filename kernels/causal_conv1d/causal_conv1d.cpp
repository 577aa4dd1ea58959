// Depthwise causal convolution + bias + SiLU, forward and backward, for channels-last rows.
//
//   D   channels        K   width of the filter (2, 3 or 4)
//   x, out, dout, dx       (rows, D); document i is rows bounds[i] … bounds[i + 1] - 1
//   initial, final, their gradients   (documents, K - 1, D): the inputs before and at a document's end
//   weight, dweight        (K, D), fp32 (fp64 for fp64 x)
//
// A vector of neighbouring channels walks each document in time order with the last K inputs, the filter
// and, in the backward, the filter's gradient in registers: each row is read once. Threads share out the
// channels, so that results don't depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// The filter's gradient is summed over so many rows first, which keeps fp32 accurate over millions.
constexpr int64_t kBlockRows = 256;

// Rows lie further apart than hardware prefetchers look: fetching them this many ahead (past the end does
// no harm) halves the time where they come from memory.
constexpr int64_t kRowsAhead = 16;

struct bfloat16 {
  uint16_t bits;
};

// GCC takes vector_size of a dependent type in a typedef only, hence the struct.
template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(64)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
constexpr int kLanes = 64 / sizeof(A);
typedef uint32_t Bits32 __attribute__((vector_size(64)));
typedef uint16_t Bits16 __attribute__((vector_size(32)));

// The first `n` lanes from memory, zero in the others.
template <typename V, typename T>
V load_lanes(const T* from, int n) {
  V lanes{};
  if (n * sizeof(T) == sizeof(V)) {
    std::memcpy(&lanes, from, sizeof(V));
  } else {
    std::memcpy(&lanes, from, n * sizeof(T));
  }
  return lanes;
}

template <typename V, typename T>
void store_lanes(T* to, const V& lanes, int n) {
  if (n * sizeof(T) == sizeof(V)) {
    std::memcpy(to, &lanes, sizeof(V));
  } else {
    std::memcpy(to, &lanes, n * sizeof(T));
  }
}

template <typename A>
Vector<A> load(const A* from, int n) {
  return load_lanes<Vector<A>>(from, n);
}

Vector<float> load(const bfloat16* from, int n) {
  return (Vector<float>)(__builtin_convertvector(load_lanes<Bits16>(from, n), Bits32) << 16);
}

template <typename A>
void store(A* to, Vector<A> value, int n) {
  store_lanes(to, value, n);
}

void store(bfloat16* to, Vector<float> value, int n) {
  Bits32 bits = (Bits32)value;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // round to nearest even
  bits = value != value ? Bits32{} + 0x7fc0 : bits;   // rounding may carry a NaN into the sign
  store_lanes(to, __builtin_convertvector(bits, Bits16), n);
}

float widen(float x) { return x; }
double widen(double x) { return x; }
float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// e^x to 1e-7, x clamped to ±87 so that neither 2^n nor 1 / (1 + e^x) overflows.
Vector<float> exp(Vector<float> x) {
  constexpr float kRound = 12582912.f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
  x = x > 87.f ? Vector<float>{} + 87.f : x;
  x = x < -87.f ? Vector<float>{} - 87.f : x;
  const Vector<float> shifted = x * 1.44269504f + kRound;
  const Vector<float> n = shifted - kRound;
  const Vector<float> r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vector<float> p = r * (1 / 720.f) + 1 / 120.f;
  p = p * r + 1 / 24.f;
  p = p * r + 1 / 6.f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * (Vector<float>)(((Bits32)shifted + 127) << 23);
}

Vector<double> exp(Vector<double> x) {  // double serves tests, not training
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// One vector of channels: where its lanes lie, and its filter.
template <typename A, int K>
struct Filter {
  int64_t channel;
  int lanes;
  Vector<A> weight[K], bias;

  Filter(const A* weights, const A* biases, int64_t D, int64_t first)
      : channel(first), lanes(int(std::min<int64_t>(kLanes<A>, D - first))) {
    for (int k = 0; k < K; ++k) weight[k] = load(weights + k * D + channel, lanes);
    bias = load(biases + channel, lanes);
  }
};

// The last K inputs, oldest first; before a document's first row they come from its initial state.
template <typename T, typename A, int K>
struct Window {
  Vector<A> input[K]{};

  Window(const T* initial, int64_t doc, int64_t D, const Filter<A, K>& filter) {
    if (initial == nullptr) return;
    const T* state = initial + doc * (K - 1) * D + filter.channel;
    for (int k = 1; k < K; ++k) input[k] = load(state + (k - 1) * D, filter.lanes);
  }
  Vector<A> push(Vector<A> next, const Filter<A, K>& filter) {  // -> the convolution at this row
    for (int k = 1; k < K; ++k) input[k - 1] = input[k];
    input[K - 1] = next;
    Vector<A> sum = filter.bias;
    for (int k = 0; k < K; ++k) sum += filter.weight[k] * input[k];
    return sum;
  }
};

template <typename T, typename A, int K>
void forward(const T* x, int64_t stride, const A* weight, const A* bias, const T* initial,
             const int64_t* bounds, int64_t n_docs, int64_t D, bool silu, T* out, T* final) {
#pragma omp parallel for schedule(static)
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    const Filter<A, K> filter(weight, bias, D, d);
    for (int64_t doc = 0; doc < n_docs; ++doc) {
      Window<T, A, K> window(initial, doc, D, filter);
      for (int64_t row = bounds[doc]; row < bounds[doc + 1]; ++row) {
        __builtin_prefetch(x + (row + kRowsAhead) * stride + d);
        __builtin_prefetch(out + (row + kRowsAhead) * D + d, 1);
        const Vector<A> sum = window.push(load(x + row * stride + d, filter.lanes), filter);
        store(out + row * D + d, silu ? sum / (A(1) + exp(-sum)) : sum, filter.lanes);
      }
      T* state = final + doc * (K - 1) * D + d;
      for (int k = 1; k < K; ++k) store(state + (k - 1) * D, window.input[k], filter.lanes);
    }
  }
}

// One token a row, whose state (slots oldest first, any strides) moves on in place; weight (D, K). Row r's state is
// states[indices[r]], none where that is below 0; its own where `indices` is null. A lane at a time: strides differ,
// and a call costs more than its work.
template <typename T, typename A, int K>
void step(T* states, int64_t row_stride, int64_t channel_stride, int64_t slot_stride, const int64_t* indices,
          const T* x, int64_t x_stride, const A* weight, const A* bias, int64_t rows, int64_t D, bool silu, T* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = indices == nullptr ? row : indices[row];
    if (index < 0) {
      std::fill_n(out + row * D, D, T{});
      continue;
    }
    for (int64_t d = 0; d < D; d += kLanes<A>) {
      const int lanes = int(std::min<int64_t>(kLanes<A>, D - d));
      const Vector<A> newest = load(x + row * x_stride + d, lanes);
      Vector<A> sum = bias == nullptr ? Vector<A>{} : load(bias + d, lanes);
      for (int i = 0; i < lanes; ++i) {
        T* slots = states + index * row_stride + (d + i) * channel_stride;
        const A* taps = weight + (d + i) * K;
        for (int k = 0; k < K - 1; ++k) sum[i] += taps[k] * widen(slots[k * slot_stride]);
        sum[i] += taps[K - 1] * newest[i];
        for (int k = 0; k < K - 2; ++k) slots[k * slot_stride] = slots[(k + 1) * slot_stride];
        slots[(K - 2) * slot_stride] = x[row * x_stride + d + i];
      }
      store(out + row * D + d, silu ? sum / (A(1) + exp(-sum)) : sum, lanes);
    }
  }
}

// With c the convolution and g = dL/dc:  dx[t] = Σ_k w[k]·g[t+K-1-k]    dw[k] = Σ_t g[t]·x[t-K+1+k]
template <typename T, typename A, int K>
void backward(const T* x, int64_t stride, const A* weight, const A* bias, const T* initial,
              const int64_t* bounds, int64_t n_docs, int64_t D, bool silu, const T* dout,
              const T* dfinal, T* dx, A* dweight, A* dbias, T* dinitial) {
#pragma omp parallel for schedule(static)
  for (int64_t d = 0; d < D; d += kLanes<A>) {
    const Filter<A, K> filter(weight, bias, D, d);
    const int lanes = filter.lanes;
    Vector<A> dw_total[K]{}, db_total{};
    for (int64_t doc = 0; doc < n_docs; ++doc) {
      const int64_t first = bounds[doc], end = bounds[doc + 1], slots = doc * (K - 1);
      Window<T, A, K> window(initial, doc, D, filter);
      Vector<A> pending[K]{};  // the gradient of each input in the window, as far as it is known
      auto emit = [&](int64_t row, Vector<A> gradient) {
        if (row >= first) {
          store(dx + row * D + d, gradient, lanes);
        } else if (dinitial != nullptr) {
          store(dinitial + (slots + row - first + K - 1) * D + d, gradient, lanes);
        }
      };
      for (int64_t block = first; block < end; block += kBlockRows) {
        Vector<A> dw[K]{}, db{};
        for (int64_t row = block; row < std::min(end, block + kBlockRows); ++row) {
          __builtin_prefetch(x + (row + kRowsAhead) * stride + d);
          __builtin_prefetch(dout + (row + kRowsAhead) * D + d);
          __builtin_prefetch(dx + (row + kRowsAhead) * D + d, 1);
          const Vector<A> sum = window.push(load(x + row * stride + d, lanes), filter);
          Vector<A> g = load(dout + row * D + d, lanes);
          if (silu) {
            const Vector<A> gate = A(1) / (A(1) + exp(-sum));
            g *= gate * (A(1) + sum * (A(1) - gate));
          }
          db += g;
          for (int k = 0; k < K; ++k) {
            dw[k] += g * window.input[k];
            pending[k] = (k + 1 < K ? pending[k + 1] : Vector<A>{}) + g * filter.weight[k];
          }
          emit(row - (K - 1), pending[0]);
        }
        for (int k = 0; k < K; ++k) dw_total[k] += dw[k];
        db_total += db;
      }
      for (int k = 1; k < K; ++k) {
        if (dfinal != nullptr) pending[k] += load(dfinal + (slots + k - 1) * D + d, lanes);
        emit(end + k - K, pending[k]);
      }
    }
    for (int k = 0; k < K; ++k) store(dweight + k * D + d, dw_total[k], lanes);
    store(dbias + d, db_total, lanes);
  }
}

template <typename Run>
void with_width(int64_t width, Run run) {
  if (width == 2) run(std::integral_constant<int, 2>{});
  if (width == 3) run(std::integral_constant<int, 3>{});
  if (width == 4) run(std::integral_constant<int, 4>{});
}

}  // namespace

// Three functions per type of x (T), with sums in A. `initial`, `dfinal`, `dinitial`, a step's `indices` and `bias` may
// be null.
#define EXPORT(NAME, T, A)                                                                          \
  extern "C" void forward_##NAME(int64_t width, const T* x, int64_t stride, const A* weight,        \
                                 const A* bias, const T* initial, const int64_t* bounds,            \
                                 int64_t n_docs, int64_t D, bool silu, T* out, T* final) {          \
    with_width(width, [&](auto K) {                                                                 \
      forward<T, A, K>(x, stride, weight, bias, initial, bounds, n_docs, D, silu, out, final);      \
    });                                                                                             \
  }                                                                                                 \
  extern "C" void backward_##NAME(int64_t width, const T* x, int64_t stride, const A* weight,       \
                                  const A* bias, const T* initial, const int64_t* bounds,           \
                                  int64_t n_docs, int64_t D, bool silu, const T* dout,              \
                                  const T* dfinal, T* dx, A* dweight, A* dbias, T* dinitial) {      \
    with_width(width, [&](auto K) {                                                                 \
      backward<T, A, K>(x, stride, weight, bias, initial, bounds, n_docs, D, silu, dout, dfinal,    \
                        dx, dweight, dbias, dinitial);                                              \
    });                                                                                             \
  }                                                                                                 \
  extern "C" void step_##NAME(int64_t width, T* states, int64_t row_stride, int64_t channel_stride, \
                              int64_t slot_stride, const int64_t* indices, const T* x,              \
                              int64_t x_stride, const A* weight, const A* bias, int64_t rows,       \
                              int64_t D, bool silu, T* out) {                                       \
    with_width(width, [&](auto K) {                                                                 \
      step<T, A, K>(states, row_stride, channel_stride, slot_stride, indices, x, x_stride, weight,  \
                    bias, rows, D, silu, out);                                                      \
    });                                                                                             \
  }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bfloat16, float)

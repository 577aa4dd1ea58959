// The Longhorn scan on a CPU (DESIGN §2): a vector of channels walks time with its states in registers.
//
// L tokens, D channels (d_inner), N states per channel; T is the type computed in, IO the type stored in memory.
// Rows of channels are far apart in memory: a chunk of steps is read row by row into buffers of [vector][step], walked
// vector by vector there, and written back row by row. States are checkpointed every CHUNK steps in the forward and rebuilt, chunk by chunk, in the backward.
// Work is split over (sequence, GROUP channels). The split depends on the shape alone, so that the order of every
// sum, and with it every bit of the result, does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int CHUNK = 16;   // steps between checkpoints; cpu.py knows it too
constexpr int GROUP = 256;  // channels that one thread walks together; cpu.py knows it too

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

// ---- what Python passes: mirrored in cpu.py --------------------------------------------------------------------------
struct Sequence { int64_t batch, start, length, first_chunk; };
struct Strided { const void* data; int64_t batch, time; };  // strides in elements; channels are contiguous
struct Problem {
  Strided u, dt, q, k, z;                // z.data is null where there is no gate
  const void *D, *dt_bias;               // of type T, always there
  const void* initial_state;             // [n_seq, D, N] of type T, or null
  const Sequence* sequences;
  int64_t n_seq, n_tokens, seqlen, d_inner, d_state, threads;
};
template <class IO> const IO* at(const Strided& s, const Sequence& q, int64_t t) {
  return (const IO*)s.data + q.batch * s.batch + (q.start + t) * s.time;
}

// k, q and 1 + Σk² of one chunk, in the type computed in.
template <class IO, class T> struct Keys {
  int n_state; std::vector<T> k, q; T one_plus_k2[CHUNK];
  explicit Keys(int n) : n_state(n), k(CHUNK * n), q(CHUNK * n) {}
  void read(const Problem& p, const Sequence& s, int64_t t0, int steps) {
    for (int i = 0; i < steps; i++) {
      const IO *kt = at<IO>(p.k, s, t0 + i), *qt = at<IO>(p.q, s, t0 + i);
      T total = 1;
      for (int n = 0; n < n_state; n++) {
        T x = scalar(kt[n]); k[i * n_state + n] = x; q[i * n_state + n] = scalar(qt[n]); total += x * x;
      }
      one_plus_k2[i] = total;
    }
  }
};

// One step for one vector of channels; returns S·q. NS is N where it is known when compiling, else 0.
template <class T, int NS, bool EXACT>
inline vec<T> step(vec<T>* S, vec<T> u, vec<T> eps, const T* k, const T* q, int n_state) {
  const int N = NS ? NS : n_state;
  vec<T> y[2] = {};  // two sums: a chain half as long
  if (EXACT) {
    vec<T> read[2] = {};
    #pragma GCC unroll 16
    for (int n = 0; n < N; n++) read[n & 1] += S[n] * k[n];
    vec<T> m = eps * (u - (read[0] + read[1]));
    #pragma GCC unroll 16
    for (int n = 0; n < N; n++) { S[n] += m * k[n]; y[n & 1] += S[n] * q[n]; }
  } else {
    #pragma GCC unroll 16
    for (int n = 0; n < N; n++) { S[n] += (eps * k[n]) * (u - S[n] * k[n]); y[n & 1] += S[n] * q[n]; }
  }
  return y[0] + y[1];
}

template <class T> constexpr T MIN_DT = -80;  // reference.py says why

template <class IO, class T, int NS, bool EXACT>
void forward(const Problem& p, IO* out, T* checkpoints, T* final_state) {
  const int64_t D = p.d_inner, groups = (D + GROUP - 1) / GROUP, vectors = GROUP / W<T>;
  const int N = NS ? NS : p.d_state;
  #pragma omp parallel num_threads(p.threads)
  {
    Keys<IO, T> keys(N);
    Buffer<T> states(vectors * N), u(vectors * CHUNK), eps(vectors * CHUNK), y(vectors * CHUNK);
    #pragma omp for collapse(2) schedule(static)
    for (int64_t si = 0; si < p.n_seq; si++) for (int64_t g = 0; g < groups; g++) {
      const Sequence& s = p.sequences[si];
      const int64_t d0 = g * GROUP, d1 = std::min(D, d0 + GROUP);
      const T* initial = p.initial_state ? (const T*)p.initial_state + si * D * N : nullptr;
      states.zero();
      if (initial) for (int64_t d = d0; d < d1; d++) for (int n = 0; n < N; n++)
        states[(d - d0) / W<T> * N + n][(d - d0) % W<T>] = initial[d * N + n];

      for (int64_t t0 = 0; t0 < s.length; t0 += CHUNK) {
        const int steps = std::min<int64_t>(CHUNK, s.length - t0);
        T* checkpoint = checkpoints ? checkpoints + (s.first_chunk + t0 / CHUNK) * N * D : nullptr;
        keys.read(p, s, t0, steps);
        for (int i = 0; i < steps; i++) for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), j = (d - d0) / W<T> * CHUNK + i;
          u[j] = load<T>(at<IO>(p.u, s, t0 + i) + d, w);
          vec<T> x = load<T>(at<IO>(p.dt, s, t0 + i) + d, w) + load<T>((const T*)p.dt_bias + d, w);
          eps[j] = 1 / (keys.one_plus_k2[i] + exp(-(x < MIN_DT<T> ? x * 0 + MIN_DT<T> : x)));
        }
        for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
          vec<T> local[NS ? NS : 1], *home = &states[block * N], *S = NS ? local : home;
          const vec<T> D_d = load<T>((const T*)p.D + d, w);
          if (NS) for (int n = 0; n < N; n++) S[n] = home[n];
          if (checkpoint) for (int n = 0; n < N; n++) store<T>(checkpoint + n * D + d, S[n], w);
          for (int i = 0; i < steps; i++) {
            const int64_t j = block * CHUNK + i;
            y[j] = D_d * u[j] + step<T, NS, EXACT>(S, u[j], eps[j], &keys.k[i * N], &keys.q[i * N], N);
          }
          if (NS) for (int n = 0; n < N; n++) home[n] = S[n];
        }
        for (int i = 0; i < steps; i++) for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), j = (d - d0) / W<T> * CHUNK + i;
          vec<T> gated = y[j];
          if (p.z.data) { vec<T> z = load<T>(at<IO>(p.z, s, t0 + i) + d, w); gated *= z * sigmoid<T>(z); }
          store<T>(out + (s.batch * p.seqlen + s.start + t0 + i) * D + d, gated, w);
        }
      }
      for (int64_t d = d0; d < d1; d++) for (int n = 0; n < N; n++)
        final_state[(si * D + d) * N + n] = states[(d - d0) / W<T> * N + n][(d - d0) % W<T>];
    }
  }
}

struct Gradients {
  const void *dout, *dfinal_state;       // dout contiguous [B, L, D]; dfinal_state [n_seq, D, N] of type T, or null
  void *du, *ddt, *dz, *dinitial_state;  // contiguous; dz and dinitial_state may be null
  void *dq, *dk;                         // partial sums [groups, tokens, N] of type T
  void *dD, *ddt_bias;                   // partial sums [n_seq, D] of type T
};

template <class IO, class T, int NS, bool EXACT>
void backward(const Problem& p, const Gradients& o, const T* checkpoints) {
  const int64_t D = p.d_inner, groups = (D + GROUP - 1) / GROUP, vectors = GROUP / W<T>;
  const int N = NS ? NS : p.d_state;
  #pragma omp parallel num_threads(p.threads)
  {
    Keys<IO, T> keys(N);
    Buffer<T> history((CHUNK + 1) * N), adjoint(vectors * N), sum_q(CHUNK * N), sum_k(CHUNK * N), sum_k2(CHUNK), sum_D(vectors), sum_bias(vectors);
    Buffer<T> u(vectors * CHUNK), eps(vectors * CHUNK), slope(vectors * CHUNK), dy(vectors * CHUNK), dz(vectors * CHUNK);
    #pragma omp for collapse(2) schedule(static)
    for (int64_t si = 0; si < p.n_seq; si++) for (int64_t g = 0; g < groups; g++) {
      const Sequence& s = p.sequences[si];
      const int64_t d0 = g * GROUP, d1 = std::min(D, d0 + GROUP), chunks = (s.length + CHUNK - 1) / CHUNK;
      adjoint.zero(); sum_D.zero(); sum_bias.zero();
      if (o.dfinal_state) for (int64_t d = d0; d < d1; d++) for (int n = 0; n < N; n++)
        adjoint[(d - d0) / W<T> * N + n][(d - d0) % W<T>] = ((const T*)o.dfinal_state)[(si * D + d) * N + n];

      for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t t0 = c * CHUNK, token0 = s.batch * p.seqlen + s.start + t0;
        const int steps = std::min<int64_t>(CHUNK, s.length - t0);
        const T* checkpoint = checkpoints + (s.first_chunk + c) * N * D;
        sum_q.zero(); sum_k.zero(); sum_k2.zero();
        keys.read(p, s, t0, steps);
        for (int i = 0; i < steps; i++) for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), j = (d - d0) / W<T> * CHUNK + i;
          u[j] = load<T>(at<IO>(p.u, s, t0 + i) + d, w);
          vec<T> x = load<T>(at<IO>(p.dt, s, t0 + i) + d, w) + load<T>((const T*)p.dt_bias + d, w);
          vec<T> e = exp(-(x < MIN_DT<T> ? x * 0 + MIN_DT<T> : x));
          eps[j] = 1 / (keys.one_plus_k2[i] + e);
          slope[j] = x < MIN_DT<T> ? x * 0 : eps[j] * (eps[j] * e);  // d eps / d x
          dy[j] = load<T>((const IO*)o.dout + (token0 + i) * D + d, w);
          if (p.z.data) {
            vec<T> z = load<T>(at<IO>(p.z, s, t0 + i) + d, w), sg = sigmoid<T>(z);
            dz[j] = dy[j] * sg * (1 + z * (1 - sg));  // times y, once that is rebuilt
            dy[j] *= z * sg;
          }
        }
        for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
          vec<T> S[NS ? NS : 1], *state = NS ? S : history.data;
          const vec<T> D_d = load<T>((const T*)p.D + d, w);
          for (int n = 0; n < N; n++) history[n] = load<T>(checkpoint + n * D + d, w);
          if (NS) for (int n = 0; n < N; n++) S[n] = history[n];
          for (int i = 0; i < steps; i++) {  // rebuild the chunk's states
            const int64_t j = block * CHUNK + i;
            vec<T>* next = &history[(i + 1) * N];
            if (!NS) { std::copy(next - N, next, next); state = next; }
            dz[j] *= D_d * u[j] + step<T, NS, EXACT>(state, u[j], eps[j], &keys.k[i * N], &keys.q[i * N], N);
            if (NS) for (int n = 0; n < N; n++) next[n] = S[n];
          }
          vec<T> local[NS ? NS : 1], *G = NS ? local : &adjoint[block * N];
          if (NS) for (int n = 0; n < N; n++) G[n] = adjoint[block * N + n];
          for (int i = steps - 1; i >= 0; i--) {
            const int64_t j = block * CHUNK + i;
            const T *k = &keys.k[i * N], *q = &keys.q[i * N];
            const vec<T> *before = &history[i * N], *after = before + N;
            vec<T> *dq = &sum_q[i * N], *dk = &sum_k[i * N];
            const vec<T> u_i = u[j], eps_i = eps[j], dy_i = dy[j];  // copies: the stores below might alias them
            vec<T> deps = {}, du = {};
            if (EXACT) {
              vec<T> read = {}, gk = {};
              #pragma GCC unroll 16
              for (int n = 0; n < N; n++) { G[n] += dy_i * q[n]; gk += G[n] * k[n]; read += before[n] * k[n]; }
              const vec<T> r = u_i - read;
              #pragma GCC unroll 16
              for (int n = 0; n < N; n++) {
                dq[n] += dy_i * after[n];
                dk[n] += eps_i * (G[n] * r - gk * before[n]);
                G[n] -= (eps_i * k[n]) * gk;
              }
              deps = gk * r; du = gk;
            } else {
              #pragma GCC unroll 16
              for (int n = 0; n < N; n++) {
                const vec<T> g = G[n] + dy_i * q[n], gk = g * k[n], gr = g * (u_i - before[n] * k[n]);
                deps += gr * k[n]; du += gk;
                dq[n] += dy_i * after[n];
                dk[n] += eps_i * (gr - gk * before[n]);
                G[n] = g - (eps_i * k[n]) * gk;
              }
            }
            sum_k2[i] -= deps * (eps_i * eps_i);  // d eps / d Σk²
            sum_D[block] += dy_i * u_i;
            u[j] = du * eps_i + D_d * dy_i;  // from here on: its gradient
            slope[j] *= deps;
            sum_bias[block] += slope[j];
          }
          if (NS) for (int n = 0; n < N; n++) adjoint[block * N + n] = G[n];
        }
        for (int i = 0; i < steps; i++) for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), j = (d - d0) / W<T> * CHUNK + i, o_t = (token0 + i) * D + d;
          store<T>((IO*)o.du + o_t, u[j], w);
          store<T>((IO*)o.ddt + o_t, slope[j], w);
          if (p.z.data) store<T>((IO*)o.dz + o_t, dz[j], w);
        }
        for (int i = 0; i < steps; i++) {
          const int64_t row = (g * p.n_tokens + token0 + i) * N;
          const T dk2 = 2 * sum<T>(sum_k2[i]);
          for (int n = 0; n < N; n++) {
            ((T*)o.dq)[row + n] = sum<T>(sum_q[i * N + n]);
            ((T*)o.dk)[row + n] = sum<T>(sum_k[i * N + n]) + dk2 * keys.k[i * N + n];
          }
        }
      }
      for (int64_t d = d0; d < d1; d += W<T>) {
        const int w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
        store<T>((T*)o.dD + si * D + d, sum_D[block], w);
        store<T>((T*)o.ddt_bias + si * D + d, sum_bias[block], w);
      }
      if (o.dinitial_state) for (int64_t d = d0; d < d1; d++) for (int n = 0; n < N; n++)
        ((T*)o.dinitial_state)[(si * D + d) * N + n] = adjoint[(d - d0) / W<T> * N + n][(d - d0) % W<T>];
    }
  }
}

// ---- entry points: with N = 16, the paper's, loops have a known length; any other N takes the general ones ----------------
#define ENTRY(NAME, IO, T, NS)                                                                                          \
  extern "C" void longhorn_forward_##NAME(const Problem* p, IO* out, T* ck, T* state, int exact) {                      \
    auto f = p->d_state == NS ? (exact ? forward<IO, T, NS, true> : forward<IO, T, NS, false>)                          \
                              : (exact ? forward<IO, T, 0, true> : forward<IO, T, 0, false>);                           \
    f(*p, out, ck, state);                                                                                              \
  }                                                                                                                     \
  extern "C" void longhorn_backward_##NAME(const Problem* p, const Gradients* o, const T* ck, int exact) {              \
    auto f = p->d_state == NS ? (exact ? backward<IO, T, NS, true> : backward<IO, T, NS, false>)                        \
                              : (exact ? backward<IO, T, 0, true> : backward<IO, T, 0, false>);                         \
    f(*p, *o, ck);                                                                                                      \
  }
ENTRY(float32, float, float, 16)
ENTRY(bfloat16, bf16, float, 16)
ENTRY(float64, double, double, 0)  // tests only: not worth the time to compile more

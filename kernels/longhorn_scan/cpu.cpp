// The Longhorn scan on a CPU: the maths is in README.md, how time is walked in ../scan/walk.h.
//
// L tokens, D channels (d_inner), N states per channel; T is the type computed in, IO the type stored in memory.
#include "../scan/walk.h"

// ---- what Python passes: mirrored in cpu_cpp.py ---------------------------------------------------------------------
struct Problem {
  Strided u, dt, q, k, z;                // z.data is null where there is no gate
  const void *D, *dt_bias;               // of type T, always there
  const void* initial_state;             // [n_seq, D, N] of type T, or null
  const Sequence* sequences;
  int64_t n_seq, n_tokens, seqlen, d_inner, d_state, threads;
};

// k, q and 1 + Σk² of one chunk, in the type computed in.
template <class IO, class T> struct Keys {
  int n_state; std::vector<T> k, q; T one_plus_k2[CHUNK];
  explicit Keys(int n) : n_state(n), k(CHUNK * n), q(CHUNK * n) {}
  void read(const Problem& p, const Chunk& c) {
    for (int i = 0; i < c.steps; i++) {
      const IO *kt = at<IO>(p.k, c.s, c.t0 + i), *qt = at<IO>(p.q, c.s, c.t0 + i);
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
template <class T> vec<T> exp_minus(vec<T> x) { return exp(-(x < MIN_DT<T> ? x * 0 + MIN_DT<T> : x)); }

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
      read_channels<T>(states, of_sequence<T>(p.initial_state, si, D, N), d0, d1, N);

      for (int64_t t0 = 0; t0 < s.length; t0 += CHUNK) {
        const Chunk c(s, d0, d1, t0);
        T* checkpoint = checkpoints ? checkpoints + c.index() * N * D : nullptr;
        keys.read(p, c);
        c.row_by_row<T>([&](int i, int64_t t, int64_t d, int w, int64_t j) {
          u[j] = load<T>(at<IO>(p.u, s, t) + d, w);
          vec<T> x = load<T>(at<IO>(p.dt, s, t) + d, w) + load<T>((const T*)p.dt_bias + d, w);
          eps[j] = 1 / (keys.one_plus_k2[i] + exp_minus<T>(x));
        });
        for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
          vec<T> local[NS ? NS : 1], *home = &states[block * N], *S = NS ? local : home;
          const vec<T> D_d = load<T>((const T*)p.D + d, w);
          if (NS) for (int n = 0; n < N; n++) S[n] = home[n];
          if (checkpoint) for (int n = 0; n < N; n++) store<T>(checkpoint + n * D + d, S[n], w);
          for (int i = 0; i < c.steps; i++) {
            const int64_t j = block * CHUNK + i;
            y[j] = D_d * u[j] + step<T, NS, EXACT>(S, u[j], eps[j], &keys.k[i * N], &keys.q[i * N], N);
          }
          if (NS) for (int n = 0; n < N; n++) home[n] = S[n];
        }
        c.row_by_row<T>([&](int i, int64_t t, int64_t d, int w, int64_t j) {
          vec<T> gated = y[j];
          if (p.z.data) { vec<T> z = load<T>(at<IO>(p.z, s, t) + d, w); gated *= z * sigmoid<T>(z); }
          store<T>(out + c.token(i, p.seqlen) * D + d, gated, w);
        });
      }
      write_channels<T>(of_sequence<T>(final_state, si, D, N), states, d0, d1, N);
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
    Buffer<T> history((CHUNK + 1) * N), adjoint(vectors * N), sum_D(vectors), sum_bias(vectors);
    Buffer<T> sum_q(CHUNK * N), sum_k(CHUNK * N), sum_k2(CHUNK);
    Buffer<T> u(vectors * CHUNK), eps(vectors * CHUNK), slope(vectors * CHUNK), dy(vectors * CHUNK);
    Buffer<T> dz(vectors * CHUNK);
    #pragma omp for collapse(2) schedule(static)
    for (int64_t si = 0; si < p.n_seq; si++) for (int64_t g = 0; g < groups; g++) {
      const Sequence& s = p.sequences[si];
      const int64_t d0 = g * GROUP, d1 = std::min(D, d0 + GROUP);
      sum_D.zero(); sum_bias.zero();
      read_channels<T>(adjoint, of_sequence<T>(o.dfinal_state, si, D, N), d0, d1, N);

      for (int64_t chunk = (s.length + CHUNK - 1) / CHUNK; chunk-- > 0;) {
        const Chunk c(s, d0, d1, chunk * CHUNK);
        const T* checkpoint = checkpoints + c.index() * N * D;
        sum_q.zero(); sum_k.zero(); sum_k2.zero();
        keys.read(p, c);
        c.row_by_row<T>([&](int i, int64_t t, int64_t d, int w, int64_t j) {
          u[j] = load<T>(at<IO>(p.u, s, t) + d, w);
          vec<T> x = load<T>(at<IO>(p.dt, s, t) + d, w) + load<T>((const T*)p.dt_bias + d, w);
          vec<T> e = exp_minus<T>(x);
          eps[j] = 1 / (keys.one_plus_k2[i] + e);
          slope[j] = x < MIN_DT<T> ? x * 0 : eps[j] * (eps[j] * e);  // d eps / d x
          dy[j] = load<T>((const IO*)o.dout + c.token(i, p.seqlen) * D + d, w);
          if (p.z.data) {
            vec<T> z = load<T>(at<IO>(p.z, s, t) + d, w), sg = sigmoid<T>(z);
            dz[j] = dy[j] * sg * (1 + z * (1 - sg));  // times y, once that is rebuilt
            dy[j] *= z * sg;
          }
        });
        for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
          vec<T> S[NS ? NS : 1], *state = NS ? S : history.data;
          const vec<T> D_d = load<T>((const T*)p.D + d, w);
          for (int n = 0; n < N; n++) history[n] = load<T>(checkpoint + n * D + d, w);
          if (NS) for (int n = 0; n < N; n++) S[n] = history[n];
          for (int i = 0; i < c.steps; i++) {  // rebuild the chunk's states
            const int64_t j = block * CHUNK + i;
            vec<T>* next = &history[(i + 1) * N];
            if (!NS) { std::copy(next - N, next, next); state = next; }
            dz[j] *= D_d * u[j] + step<T, NS, EXACT>(state, u[j], eps[j], &keys.k[i * N], &keys.q[i * N], N);
            if (NS) for (int n = 0; n < N; n++) next[n] = S[n];
          }
          vec<T> local[NS ? NS : 1], *G = NS ? local : &adjoint[block * N];
          if (NS) for (int n = 0; n < N; n++) G[n] = adjoint[block * N + n];
          for (int i = c.steps - 1; i >= 0; i--) {
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
        c.row_by_row<T>([&](int i, int64_t, int64_t d, int w, int64_t j) {
          const int64_t place = c.token(i, p.seqlen) * D + d;
          store<T>((IO*)o.du + place, u[j], w);
          store<T>((IO*)o.ddt + place, slope[j], w);
          if (p.z.data) store<T>((IO*)o.dz + place, dz[j], w);
        });
        for (int i = 0; i < c.steps; i++) {
          const int64_t row = (g * p.n_tokens + c.token(i, p.seqlen)) * N;
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
      write_channels<T>(of_sequence<T>(o.dinitial_state, si, D, N), adjoint, d0, d1, N);
    }
  }
}

// ---- decoding: one token a row, the state moved on in place; mirrored in cpu_cpp.py ----------------------------------
struct Step {
  const void *u, *dt, *q, *k, *z;        // rows of channels or states, each so many elements after the last; z or null
  const void *D, *dt_bias;               // of type T, or null
  const int64_t* indices;                // which row of the state is a token's, below 0 for none; null: its own
  void *state, *out;                     // state of type T, with any strides; out contiguous [rows, D]
  int64_t u_row, dt_row, q_row, k_row, z_row, state_row, state_channel, state_entry, rows, d_inner, d_state;
};

template <class IO, class T, int NS, bool EXACT>
void step_rows(const Step& p) {
  const int64_t D = p.d_inner, stride = p.state_channel;
  const int N = NS ? NS : p.d_state;
  std::vector<T> k(N), q(N);
  Buffer<T> general(NS ? 0 : N);
  for (int64_t row = 0; row < p.rows; row++) {
    const int64_t index = p.indices ? p.indices[row] : row;
    IO* out = (IO*)p.out + row * D;
    if (index < 0) { std::fill_n(out, D, IO{}); continue; }
    T* state = (T*)p.state + index * p.state_row;
    const IO *k_row = (const IO*)p.k + row * p.k_row, *q_row = (const IO*)p.q + row * p.q_row;
    T one_plus_k2 = 1;
    for (int n = 0; n < N; n++) { k[n] = scalar(k_row[n]); q[n] = scalar(q_row[n]); one_plus_k2 += k[n] * k[n]; }
    for (int64_t d = 0; d < D; d += W<T>) {
      const int w = std::min<int64_t>(W<T>, D - d);
      vec<T> local[NS ? NS : 1], *S = NS ? local : general.data;
      for (int n = 0; n < N; n++) S[n] = gather<T>(state + d * stride + n * p.state_entry, stride, w);
      const vec<T> u = load<T>((const IO*)p.u + row * p.u_row + d, w);
      vec<T> x = load<T>((const IO*)p.dt + row * p.dt_row + d, w), y = {};
      if (p.dt_bias) x += load<T>((const T*)p.dt_bias + d, w);
      const vec<T> eps = 1 / (one_plus_k2 + exp_minus<T>(x));
      if (p.D) y = load<T>((const T*)p.D + d, w) * u;
      y += step<T, NS, EXACT>(S, u, eps, k.data(), q.data(), N);
      if (p.z) { const vec<T> z = load<T>((const IO*)p.z + row * p.z_row + d, w); y *= z * sigmoid<T>(z); }
      store<T>(out + d, y, w);
      for (int n = 0; n < N; n++) scatter<T>(state + d * stride + n * p.state_entry, S[n], stride, w);
    }
  }
}

// ---- entry points: with N = 16, the paper's, loops have a known length; any other N takes the general ones ----------
#define ENTRY(NAME, IO, T, NS)                                                                                      \
  extern "C" void longhorn_forward_##NAME(const Problem* p, IO* out, T* ck, T* state, int exact) {                  \
    auto f = p->d_state == NS ? (exact ? forward<IO, T, NS, true> : forward<IO, T, NS, false>)                      \
                              : (exact ? forward<IO, T, 0, true> : forward<IO, T, 0, false>);                       \
    f(*p, out, ck, state);                                                                                          \
  }                                                                                                                 \
  extern "C" void longhorn_backward_##NAME(const Problem* p, const Gradients* o, const T* ck, int exact) {          \
    auto f = p->d_state == NS ? (exact ? backward<IO, T, NS, true> : backward<IO, T, NS, false>)                    \
                              : (exact ? backward<IO, T, 0, true> : backward<IO, T, 0, false>);                     \
    f(*p, *o, ck);                                                                                                  \
  }                                                                                                                 \
  extern "C" void longhorn_step_##NAME(const Step* p, int exact) {                                                  \
    auto f = p->d_state == NS ? (exact ? step_rows<IO, T, NS, true> : step_rows<IO, T, NS, false>)                  \
                              : (exact ? step_rows<IO, T, 0, true> : step_rows<IO, T, 0, false>);                   \
    f(*p);                                                                                                          \
  }
ENTRY(float32, float, float, 16)
ENTRY(bfloat16, bf16, float, 16)
ENTRY(float64, double, double, 0)  // tests only: not worth the time to compile more

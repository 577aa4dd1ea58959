// Mamba-1's selective scan on a CPU: the maths is in README.md, how time is walked in ../scan/walk.h.
//
// L tokens, D channels (d_inner), N states per channel; T is the type computed in, IO the type stored in memory.
#include "../scan/walk.h"

// ---- what Python passes: mirrored in cpu_cpp.py ---------------------------------------------------------------------
struct Problem {
  Strided u, dt, B, C, z;                // z.data is null where there is no gate
  const void *A, *D, *dt_bias;           // [D, N], [D], [D] of type T, always there
  const void* initial_state;             // [n_seq, D, N] of type T, or null
  const Sequence* sequences;
  int64_t n_seq, n_tokens, seqlen, d_inner, d_state, threads;
};
struct Gradients {
  const void *dout, *dfinal_state;       // dout contiguous [B, L, D]; dfinal_state [n_seq, D, N] of type T, or null
  void *du, *ddt, *dz, *dinitial_state;  // contiguous; dz and dinitial_state may be null
  void* dA;                              // partial sums [n_seq, D, N] of type T
  void *dB, *dC;                         // partial sums [groups, tokens, N] of type T
  void *dD, *ddt_bias;                   // partial sums [n_seq, D] of type T
};

// ---- softplus and its slope -----------------------------------------------------------------------------------------
inline vec<double> log1p(vec<double> y) { for (int i = 0; i < W<double>; i++) y[i] = std::log1p(y[i]); return y; }
inline vec<float> log1p(vec<float> y) {  // for y in [0, 1]: 2·atanh(s), its series up to s^15; s is at most 1/3
  const vec<float> s = y / (2 + y), q = s * s;
  vec<float> p = q / 15 + 1 / 13.f;
  p = p * q + 1 / 11.f; p = p * q + 1 / 9.f; p = p * q + 1 / 7.f; p = p * q + 1 / 5.f; p = p * q + 1 / 3.f;
  return 2 * (s + s * q * p);
}
template <class T> vec<T> softplus(vec<T> x) {
  return (x > 0 ? x : x * 0) + log1p(exp(x > 0 ? -x : x));  // e^x would overflow, ln(1 + e^x) lose e^x below 1e-7
}

// B and C of one chunk, in the type computed in.
template <class IO, class T> struct Rows {
  int N; std::vector<T> B, C;
  explicit Rows(int n) : N(n), B(CHUNK * n), C(CHUNK * n) {}
  void read(const Problem& p, const Chunk& c) {
    for (int i = 0; i < c.steps; i++) {
      const IO *Bt = at<IO>(p.B, c.s, c.t0 + i), *Ct = at<IO>(p.C, c.s, c.t0 + i);
      for (int n = 0; n < N; n++) { B[i * N + n] = scalar(Bt[n]); C[i * N + n] = scalar(Ct[n]); }
    }
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------
// One step for one vector of channels; returns S·C, and the decays exp(delta·A) where `decays` is given. `input` is
// delta·u. NS is N where it is known when compiling, else 0.
template <class T, int NS>
inline vec<T> step(vec<T>* S, const vec<T>* A, vec<T> delta, vec<T> input, const T* B, const T* C, int n_state,
                   vec<T>* decays) {
  const int N = NS ? NS : n_state;
  vec<T> y[2] = {};  // two sums: a chain half as long
  #pragma GCC unroll 16
  for (int n = 0; n < N; n++) {
    const vec<T> a = exp(delta * A[n]);
    if (decays) decays[n] = a;
    S[n] = a * S[n] + input * B[n];
    y[n & 1] += S[n] * C[n];
  }
  return y[0] + y[1];
}

template <class IO, class T, int NS>
void forward(const Problem& p, IO* out, T* checkpoints, T* final_state) {
  const int64_t D = p.d_inner, groups = (D + GROUP - 1) / GROUP, vectors = GROUP / W<T>;
  const int N = NS ? NS : p.d_state;
  #pragma omp parallel num_threads(p.threads)
  {
    Rows<IO, T> rows(N);
    Buffer<T> A(vectors * N), states(vectors * N), u(vectors * CHUNK), delta(vectors * CHUNK), y(vectors * CHUNK);
    #pragma omp for collapse(2) schedule(static)
    for (int64_t si = 0; si < p.n_seq; si++) for (int64_t g = 0; g < groups; g++) {
      const Sequence& s = p.sequences[si];
      const int64_t d0 = g * GROUP, d1 = std::min(D, d0 + GROUP);
      read_channels<T>(A, p.A, d0, d1, N);
      read_channels<T>(states, of_sequence<T>(p.initial_state, si, D, N), d0, d1, N);
      for (int64_t t0 = 0; t0 < s.length; t0 += CHUNK) {
        const Chunk c(s, d0, d1, t0);
        rows.read(p, c);
        c.row_by_row<T>([&](int, int64_t t, int64_t d, int w, int64_t j) {
          u[j] = load<T>(at<IO>(p.u, s, t) + d, w);
          delta[j] = softplus<T>(load<T>(at<IO>(p.dt, s, t) + d, w) + load<T>((const T*)p.dt_bias + d, w));
        });
        T* checkpoint = checkpoints ? checkpoints + c.index() * N * D : nullptr;
        for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
          vec<T> local[NS ? NS : 1], *home = &states[block * N], *S = NS ? local : home;
          const vec<T> D_d = load<T>((const T*)p.D + d, w), *A_d = &A[block * N];
          if (NS) for (int n = 0; n < N; n++) S[n] = home[n];
          if (checkpoint) for (int n = 0; n < N; n++) store<T>(checkpoint + n * D + d, S[n], w);
          for (int i = 0; i < c.steps; i++) {
            const int64_t j = block * CHUNK + i;
            const T *B = &rows.B[i * N], *C = &rows.C[i * N];
            y[j] = D_d * u[j] + step<T, NS>(S, A_d, delta[j], delta[j] * u[j], B, C, N, nullptr);
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

// ---- backward -------------------------------------------------------------------------------------------------------
// One thread's buffers.
template <class IO, class T> struct Work {
  Rows<IO, T> rows;
  Buffer<T> A, sum_A, adjoint;              // [vector][n]
  Buffer<T> sum_D, sum_bias;                // [vector]
  Buffer<T> u, delta, slope, dy, dz;        // [vector][step]
  Buffer<T> history, decays, sum_B, sum_C;  // [step][n]: the first two of one vector, the sums over all
  Work(int N, int vectors)
      : rows(N), A(vectors * N), sum_A(vectors * N), adjoint(vectors * N), sum_D(vectors), sum_bias(vectors),
        u(vectors * CHUNK), delta(vectors * CHUNK), slope(vectors * CHUNK), dy(vectors * CHUNK), dz(vectors * CHUNK),
        history((CHUNK + 1) * N), decays(CHUNK * N), sum_B(CHUNK * N), sum_C(CHUNK * N) {}
};

template <class IO, class T> void read_chunk(const Problem& p, const Gradients& o, const Chunk& c, Work<IO, T>& work) {
  work.rows.read(p, c);
  c.row_by_row<T>([&](int i, int64_t t, int64_t d, int w, int64_t j) {
    const vec<T> x = load<T>(at<IO>(p.dt, c.s, t) + d, w) + load<T>((const T*)p.dt_bias + d, w);
    work.u[j] = load<T>(at<IO>(p.u, c.s, t) + d, w);
    work.delta[j] = softplus<T>(x);
    work.slope[j] = sigmoid<T>(x);  // d delta / d x
    work.dy[j] = load<T>((const IO*)o.dout + c.token(i, p.seqlen) * p.d_inner + d, w);
    if (!p.z.data) return;
    const vec<T> z = load<T>(at<IO>(p.z, c.s, t) + d, w), gate = sigmoid<T>(z);
    work.dz[j] = work.dy[j] * gate * (1 + z * (1 - gate));  // times y, once that is rebuilt
    work.dy[j] *= z * gate;
  });
}

// The chunk's states for one vector, from its checkpoint in history[0 … N); completes dz.
template <class IO, class T, int NS>
inline void rebuild(Work<IO, T>& work, int64_t block, int steps, vec<T> D_d, int n_state) {
  const int N = NS ? NS : n_state;
  vec<T> local[NS ? NS : 1], *S = local;
  if (NS) for (int n = 0; n < N; n++) S[n] = work.history[n];
  for (int i = 0; i < steps; i++) {
    const int64_t j = block * CHUNK + i;
    const vec<T> u = work.u[j], delta = work.delta[j];
    vec<T>* next = &work.history[(i + 1) * N];
    if (!NS) { std::copy(next - N, next, next); S = next; }
    const T *B = &work.rows.B[i * N], *C = &work.rows.C[i * N];
    work.dz[j] *= D_d * u + step<T, NS>(S, &work.A[block * N], delta, delta * u, B, C, N, &work.decays[i * N]);
    if (NS) for (int n = 0; n < N; n++) next[n] = S[n];
  }
}

// The chunk's steps in reverse for one vector: the adjoint goes from after the chunk to before it, u becomes its own
// gradient and slope that of dt.
template <class IO, class T, int NS>
inline void walk_back(Work<IO, T>& work, int64_t block, int steps, vec<T> D_d, int n_state) {
  const int N = NS ? NS : n_state;
  vec<T> local[NS ? NS : 1], *home = &work.adjoint[block * N], *G = NS ? local : home;
  const vec<T>* A = &work.A[block * N];
  vec<T>* dA = &work.sum_A[block * N];
  if (NS) for (int n = 0; n < N; n++) G[n] = home[n];
  for (int i = steps - 1; i >= 0; i--) {
    const int64_t j = block * CHUNK + i;
    const T *B = &work.rows.B[i * N], *C = &work.rows.C[i * N];
    const vec<T> *before = &work.history[i * N], *after = before + N, *decays = &work.decays[i * N];
    vec<T> *dB = &work.sum_B[i * N], *dC = &work.sum_C[i * N];
    const vec<T> u = work.u[j], delta = work.delta[j], dy = work.dy[j], input = delta * u;
    vec<T> along_A = {}, along_B = {};
    #pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      const vec<T> g = G[n] + dy * C[n], passed = g * decays[n];
      const vec<T> dexponent = passed * before[n];  // the gradient of delta·A
      dC[n] += dy * after[n];
      dB[n] += g * input;
      dA[n] += dexponent * delta;
      along_A += dexponent * A[n];
      along_B += g * B[n];
      G[n] = passed;
    }
    work.sum_D[block] += dy * u;
    work.u[j] = delta * along_B + D_d * dy;
    work.slope[j] *= along_A + u * along_B;
    work.sum_bias[block] += work.slope[j];
  }
  if (NS) for (int n = 0; n < N; n++) home[n] = G[n];
}

template <class IO, class T>
void write_chunk(const Problem& p, const Gradients& o, const Chunk& c, Work<IO, T>& work, int64_t group) {
  c.row_by_row<T>([&](int i, int64_t, int64_t d, int w, int64_t j) {
    const int64_t place = c.token(i, p.seqlen) * p.d_inner + d;
    store<T>((IO*)o.du + place, work.u[j], w);
    store<T>((IO*)o.ddt + place, work.slope[j], w);
    if (p.z.data) store<T>((IO*)o.dz + place, work.dz[j], w);
  });
  const int64_t row = (group * p.n_tokens + c.token(0, p.seqlen)) * p.d_state;
  for (int64_t i = 0; i < c.steps * p.d_state; i++) {
    ((T*)o.dB)[row + i] = sum<T>(work.sum_B[i]);
    ((T*)o.dC)[row + i] = sum<T>(work.sum_C[i]);
  }
}

template <class IO, class T, int NS>
void backward(const Problem& p, const Gradients& o, const T* checkpoints) {
  const int64_t D = p.d_inner, groups = (D + GROUP - 1) / GROUP;
  const int N = p.d_state;
  #pragma omp parallel num_threads(p.threads)
  {
    Work<IO, T> work(N, GROUP / W<T>);
    #pragma omp for collapse(2) schedule(static)
    for (int64_t si = 0; si < p.n_seq; si++) for (int64_t g = 0; g < groups; g++) {
      const Sequence& s = p.sequences[si];
      const int64_t d0 = g * GROUP, d1 = std::min(D, d0 + GROUP);
      work.sum_A.zero(); work.sum_D.zero(); work.sum_bias.zero();
      read_channels<T>(work.A, p.A, d0, d1, N);
      read_channels<T>(work.adjoint, of_sequence<T>(o.dfinal_state, si, D, N), d0, d1, N);
      for (int64_t i = (s.length + CHUNK - 1) / CHUNK; i-- > 0;) {
        const Chunk c(s, d0, d1, i * CHUNK);
        work.sum_B.zero(); work.sum_C.zero();
        read_chunk(p, o, c, work);
        for (int64_t d = d0; d < d1; d += W<T>) {
          const int64_t w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
          const T* checkpoint = checkpoints + c.index() * N * D + d;
          const vec<T> D_d = load<T>((const T*)p.D + d, w);
          for (int n = 0; n < N; n++) work.history[n] = load<T>(checkpoint + n * D, w);
          rebuild<IO, T, NS>(work, block, c.steps, D_d, N);
          walk_back<IO, T, NS>(work, block, c.steps, D_d, N);
        }
        write_chunk(p, o, c, work, g);
      }
      for (int64_t d = d0; d < d1; d += W<T>) {
        const int w = std::min<int64_t>(W<T>, d1 - d), block = (d - d0) / W<T>;
        store<T>((T*)o.dD + si * D + d, work.sum_D[block], w);
        store<T>((T*)o.ddt_bias + si * D + d, work.sum_bias[block], w);
      }
      write_channels<T>(of_sequence<T>(o.dA, si, D, N), work.sum_A, d0, d1, N);
      write_channels<T>(of_sequence<T>(o.dinitial_state, si, D, N), work.adjoint, d0, d1, N);
    }
  }
}

// ---- entry points: with N = 16, the paper's, loops have a known length; any other N takes the general ones ----------
#define ENTRY(NAME, IO, T, NS)                                                                              \
  extern "C" void selective_forward_##NAME(const Problem* p, IO* out, T* ck, T* state) {                    \
    (p->d_state == NS ? forward<IO, T, NS> : forward<IO, T, 0>)(*p, out, ck, state);                        \
  }                                                                                                         \
  extern "C" void selective_backward_##NAME(const Problem* p, const Gradients* o, const T* ck) {            \
    (p->d_state == NS ? backward<IO, T, NS> : backward<IO, T, 0>)(*p, *o, ck);                              \
  }
ENTRY(float32, float, float, 16)
ENTRY(bfloat16, bf16, float, 16)
ENTRY(float64, double, double, 0)  // tests only: not worth the time to compile more

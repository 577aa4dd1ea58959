// How a CPU scan walks time: mirrored in native.py. L tokens, D channels (d_inner), N states per channel.
//
// A vector of channels walks time with its states in registers. Rows of channels are far apart in memory, so a chunk
// of steps is read row by row into buffers of [vector][step], walked vector by vector there, and written back row by
// row. States are checkpointed every CHUNK steps in the forward and rebuilt, chunk by chunk, in the backward.
// Work is split over (sequence, GROUP channels). The split depends on the shape alone, so that the order of every
// sum, and with it every bit of the result, does not depend on the number of threads.
#pragma once
#include <algorithm>
#include <vector>
#include "vectors.h"

constexpr int CHUNK = 16;   // steps between checkpoints; sequences.py knows it too
constexpr int GROUP = 256;  // channels that one thread walks together; native.py knows it too

struct Sequence { int64_t batch, start, length, first_chunk; };
struct Strided { const void* data; int64_t batch, time; };  // strides in elements; channels are contiguous
template <class IO> const IO* at(const Strided& s, const Sequence& q, int64_t t) {
  return (const IO*)s.data + q.batch * s.batch + (q.start + t) * s.time;
}

// Channels d0…d1 of a [D, N] array, as vectors of channels: [vector][n].
template <class T> void read_channels(Buffer<T>& to, const void* from, int64_t d0, int64_t d1, int N) {
  to.zero();
  if (from) for (int64_t d = d0; d < d1; d++) for (int n = 0; n < N; n++)
    to[(d - d0) / W<T> * N + n][(d - d0) % W<T>] = ((const T*)from)[d * N + n];
}
template <class T> void write_channels(void* to, Buffer<T>& from, int64_t d0, int64_t d1, int N) {
  if (to) for (int64_t d = d0; d < d1; d++) for (int n = 0; n < N; n++)
    ((T*)to)[d * N + n] = from[(d - d0) / W<T> * N + n][(d - d0) % W<T>];
}
// The [D, N] array of sequence `i`, or null where there are none.
template <class T> T* of_sequence(const void* arrays, int64_t i, int64_t D, int N) {
  return arrays ? (T*)arrays + i * D * N : nullptr;
}

// Steps t0…t0 + steps of a sequence, for channels d0…d1: what a thread walks at a time.
struct Chunk {
  const Sequence& s; int64_t d0, d1, t0; int steps;
  Chunk(const Sequence& s, int64_t d0, int64_t d1, int64_t t0)
      : s(s), d0(d0), d1(d1), t0(t0), steps(std::min<int64_t>(CHUNK, s.length - t0)) {}
  int64_t index() const { return s.first_chunk + t0 / CHUNK; }                                // of its checkpoint
  int64_t token(int i, int64_t seqlen) const { return s.batch * seqlen + s.start + t0 + i; }  // of its step i
  // f(step, its time, channel, lanes, place in [vector][step]) for every vector of channels, row by row.
  template <class T, class F> void row_by_row(F f) const {
    for (int i = 0; i < steps; i++) for (int64_t d = d0; d < d1; d += W<T>)
      f(i, t0 + i, d, std::min<int64_t>(W<T>, d1 - d), (d - d0) / W<T> * CHUNK + i);
  }
};

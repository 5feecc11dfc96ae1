// Softmax attention inside random batches on a CPU: gather, attend and scatter, forward and backward, in fp32.
//
// A task is one head of one batch. It gathers the rows of its tokens where they stand into scratch that the caches hold,
// and scatters its results there. Nobody adds to what another task wrote: the same input gives the same bits, under any
// number of threads. Compiled on the machine that runs it, for heads of at most SIZE_D numbers in query and key and
// SIZE_E in value, multiples of the longest vector.
//
// Logits are held transposed, [keys, QUERIES]: maxima, sums and log-sum-exps of queries are then plain operations of
// vectors, and every product below has the same shape, C[r, lanes] += A[r, k] · B[k, lanes], with compile-time strides.
//
// What is not a number stays so, where the formula in plain torch has it: nan, logits of +inf, logits of -inf for all
// keys. A token with no key at all, alone in its batch and left out of its own keys, has output 0, log-sum-exp -inf.
//
// Letters: r rows, v vectors of a row, i queries and j keys of the batch, d and e numbers of a head.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

constexpr int D = SIZE_D, E = SIZE_E;
static_assert(D % LANES == 0 && E % LANES == 0);
constexpr int QUERIES = 64;  // queries at a time
// Keys at a time: logits are then 32 KiB, and no sum of many terms is longer, so that its rounding errors stay small.
constexpr int KEYS = 128;

Vec load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
void store(float* x, Vec y) { *reinterpret_cast<Unaligned*>(x) = y; }
Vec spread(float x) { return x - Vec{}; }
Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b if one of them is nan

// exp with an error of about one unit in the last place; 0 below the smallest normal number; nan stays nan.
// Source: the rational-free form of Cephes' expf (Moshier), x = n ln 2 + r.
Vec exponential(Vec x) {
  const Vec shift = spread(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer
  const Vec clamped = x < -87.3f ? spread(-87.3f) : x;
  const Vec moved = clamped * 1.44269504088896341f + shift, n = moved - shift;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec y = spread(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const Int power = ((Int)moved - (Int)shift + 127) << 23;
  return x < -87.3f ? Vec{} : y * (Vec)power;
}

// C[r, :] (+)= Σ_k A[r, k] B[k, :] for R rows and V vectors, which stay in registers.
template <int R, int V, int A_ROW, int A_COL, int B_ROW, int C_ROW>
inline __attribute__((always_inline)) void tile(const float* a, const float* b, float* c, int depth, bool add) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int k = 0; k < depth; ++k) {
    Vec right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + k * B_ROW + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float left = a[r * A_ROW + k * A_COL];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * C_ROW + v * LANES;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <int R, int V, int A_ROW, int A_COL, int B_ROW, int C_ROW>
inline void last_rows(int rows, const float* a, const float* b, float* c, int depth, bool add) {
  if constexpr (R > 0) {
    if (rows == R) tile<R, V, A_ROW, A_COL, B_ROW, C_ROW>(a, b, c, depth, add);
    else last_rows<R - 1, V, A_ROW, A_COL, B_ROW, C_ROW>(rows, a, b, c, depth, add);
  }
}

template <int V, int A_ROW, int A_COL, int B_ROW, int C_ROW>
inline void panel(const float* a, const float* b, float* c, int rows, int depth, bool add) {
  constexpr int R = std::min(12, REGISTERS * 3 / 4 / V);
  int r = 0;
  for (; r + R <= rows; r += R) tile<R, V, A_ROW, A_COL, B_ROW, C_ROW>(a + r * A_ROW, b, c + r * C_ROW, depth, add);
  last_rows<R - 1, V, A_ROW, A_COL, B_ROW, C_ROW>(rows - r, a + r * A_ROW, b, c + r * C_ROW, depth, add);
}

// C[rows, WIDTH] (+)= A[rows, depth] · B[depth, WIDTH].
template <int WIDTH, int A_ROW, int A_COL, int B_ROW, int C_ROW>
void multiply(const float* a, const float* b, float* c, int rows, int depth, bool add) {
  constexpr int VECTORS = WIDTH / LANES, WHOLE = VECTORS / 4 * 4, REST = VECTORS - WHOLE;
  for (int v = 0; v < WHOLE; v += 4)
    panel<4, A_ROW, A_COL, B_ROW, C_ROW>(a, b + v * LANES, c + v * LANES, rows, depth, add);
  if constexpr (REST > 0)
    panel<REST, A_ROW, A_COL, B_ROW, C_ROW>(a, b + WHOLE * LANES, c + WHOLE * LANES, rows, depth, add);
}

constexpr float NONE = -std::numeric_limits<float>::infinity();

// A row of at most WIDTH numbers.
template <int WIDTH> void copy(const float* from, float* to, int64_t size, float factor) {
  if (size == WIDTH)
    for (int d = 0; d < WIDTH; d += LANES) store(to + d, load(from + d) * factor);
  else
    for (int64_t d = 0; d < size; ++d) to[d] = from[d] * factor;
}

// Random bits of a pair of positions in batch order, for dropout. Source: the finalizer of MurmurHash3 (Appleby).
template <class T> T mixed(T x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}
uint32_t key_of(int64_t position, uint32_t seed) {
  return mixed(mixed(uint32_t(position) ^ seed) ^ uint32_t(uint64_t(position) >> 32));
}

}  // namespace

extern "C" {

struct Rows {  // a tensor [N, H, size], strides in numbers; those of the last dimension are adjacent
  float* data;
  int64_t row, head;
};

struct Batches {
  const int64_t *order, *starts, *widths;  // [N], [M], [M], as in randbatch.Partition
  const float* shift;  // [M, H], added to the logit of a token with itself; -inf leaves it out; null is 0
  int64_t batches, heads, widest, threads, size_d, size_e;
  uint64_t seed;
  double dropout_p;
  float scale;
};
}

namespace {

// One thread's work: where the numbers of one head of one batch are held.
class Worker {
 public:
  Worker(const Batches& all, bool backward)
      : all_(all), k_(all.widest * D), v_(all.widest * E), s_(logits()), q_(D * QUERIES), qt_(D * QUERIES),
        o_(E * QUERIES) {
    if (!backward) return;
    for (auto [buffer, size] : {std::pair{&dk_, k_.size()}, {&dv_, v_.size()}, {&ds_, logits()}, {&dq_, q_.size()},
                                {&gt_, o_.size()}, {&g_, o_.size()}})
      buffer->resize(size);
  }

  void forward(int64_t task, Rows query, Rows key, Rows value, Rows out, float* lse) {
    begin(task, key, value);
    if (is_lonely()) {
      std::fill_n(row(out, 0), all_.size_e, 0.f);
      lse[lse_at(0)] = NONE;
      return;
    }
    for (int64_t i = 0; i < width_; i += QUERIES) {
      const int rows = begin_queries(i, query);
      Vec top[QUERIES / LANES], total[QUERIES / LANES];
      for (auto& x : top) x = spread(NONE);
      for (auto& x : total) x = Vec{};
      for (int64_t j = 0; j < width_; j += KEYS) {
        const int keys = std::min<int64_t>(KEYS, width_ - j);
        find_logits(i, j, rows, keys);
        normalise(i, j, keys, rows, top, total);
        multiply<E, 1, QUERIES, E, E>(&s_[0], &v_[j * E], &o_[0], rows, keys, j > 0);
      }
      finish(i, rows, top, total, out, lse);
    }
  }

  void backward(int64_t task, Rows grad, const float* grad_lse, Rows query, Rows key, Rows value, Rows out,
                const float* lse, Rows to_query, Rows to_key, Rows to_value) {
    begin(task, key, value);
    if (is_lonely()) {
      for (Rows to : {to_query, to_key}) std::fill_n(row(to, 0), all_.size_d, 0.f);
      std::fill_n(row(to_value, 0), all_.size_e, 0.f);
      return;
    }
    for (int64_t i = 0; i < width_; i += QUERIES) {
      const int rows = begin_queries(i, query);
      begin_gradients(i, rows, grad, grad_lse, out, lse);
      for (int64_t j = 0; j < width_; j += KEYS) {
        const int keys = std::min<int64_t>(KEYS, width_ - j);
        find_logits(i, j, rows, keys);
        multiply<QUERIES, E, 1, QUERIES, QUERIES>(&v_[j * E], &gt_[0], &ds_[0], keys, all_.size_e, false);
        find_slopes(i, j, rows, keys);
        multiply<E, QUERIES, 1, E, E>(&s_[0], &g_[0], &dv_[j * E], keys, rows, i > 0);
        multiply<D, QUERIES, 1, D, D>(&ds_[0], &q_[0], &dk_[j * D], keys, rows, i > 0);
        multiply<D, 1, QUERIES, D, D>(&ds_[0], &k_[j * D], &dq_[0], rows, keys, j > 0);
      }
      for (int r = 0; r < rows; ++r) copy<D>(&dq_[r * D], row(to_query, i + r), all_.size_d, all_.scale);
    }
    for (int64_t j = 0; j < width_; ++j) {
      copy<D>(&dk_[j * D], row(to_key, j), all_.size_d, 1.f);
      copy<E>(&dv_[j * E], row(to_value, j), all_.size_e, 1.f);
    }
  }

 private:
  typedef std::vector<float> Numbers;

  size_t logits() const { return std::min<int64_t>(KEYS, all_.widest) * QUERIES; }
  int64_t token(int64_t i) const { return all_.order[start_ + i]; }
  float* row(Rows x, int64_t i) const { return x.data + token(i) * x.row + head_ * x.head; }
  int64_t lse_at(int64_t i) const { return token(i) * all_.heads + head_; }
  bool is_lonely() const { return width_ == 1 && own_ == NONE; }

  void begin(int64_t task, Rows key, Rows value) {
    const int64_t batch = task / all_.heads;
    head_ = task % all_.heads, start_ = all_.starts[batch], width_ = all_.widths[batch];
    own_ = all_.shift ? all_.shift[task] : 0.f;
    for (int64_t j = 0; j < width_; ++j) {
      copy<D>(row(key, j), &k_[j * D], all_.size_d, 1.f);
      copy<E>(row(value, j), &v_[j * E], all_.size_e, 1.f);
    }
  }

  // The rows of queries, scaled, also transposed; what a tile has too many is 0.
  int begin_queries(int64_t i, Rows query) {
    const int rows = std::min<int64_t>(QUERIES, width_ - i);
    for (int r = 0; r < rows; ++r) copy<D>(row(query, i + r), &q_[r * D], all_.size_d, all_.scale);
    transpose<D>(q_, qt_, rows);
    return rows;
  }

  void begin_gradients(int64_t i, int rows, Rows grad, const float* grad_lse, Rows out, const float* lse) {
    for (int r = 0; r < rows; ++r) {
      copy<E>(row(grad, i + r), &g_[r * E], all_.size_e, 1.f);
      const float *g = &g_[r * E], *y = row(out, i + r);
      const int64_t at = lse_at(i + r);
      float sum = grad_lse ? -grad_lse[at] : 0.f;
      for (int e = 0; e < all_.size_e; ++e) sum += g[e] * y[e];
      delta_[r] = sum;
      norm_[r] = lse[at];
    }
    transpose<E>(g_, gt_, rows);
  }

  template <int WIDTH> static void transpose(const Numbers& x, Numbers& y, int rows) {
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < WIDTH; ++d) y[d * QUERIES + r] = x[r * WIDTH + d];
    for (int d = 0; d < WIDTH && rows < QUERIES; ++d) std::fill(&y[d * QUERIES + rows], &y[d * QUERIES] + QUERIES, 0.f);
  }

  void find_logits(int64_t i, int64_t j, int rows, int keys) {
    multiply<QUERIES, D, 1, QUERIES, QUERIES>(&k_[j * D], &qt_[0], &s_[0], keys, all_.size_d, false);
    if (own_ == 0.f) return;
    each_own(i, j, rows, keys, [&](size_t at) { s_[at] = own_ == NONE ? NONE : s_[at] + own_; });
  }

  // Where in a block of logits tokens meet themselves.
  template <class Visit> static void each_own(int64_t i, int64_t j, int rows, int keys, Visit visit) {
    for (int64_t own = std::max(i, j); own < std::min(i + rows, j + keys); ++own) visit((own - j) * QUERIES + own - i);
  }

  // What dropout multiplies weights of key j with.
  Vec kept(int v, uint32_t key) const {
    const Bits bits = mixed<Bits>(*reinterpret_cast<const Bits*>(&row_bits_[v * LANES]) ^ key);
    const uint32_t limit = uint32_t(std::min(4294967295.0, all_.dropout_p * 4294967296.0));
    return bits >= limit ? spread(float(1 / (1 - all_.dropout_p))) : Vec{};
  }
  void begin_dropout(int64_t i) {
    for (int r = 0; r < QUERIES; ++r) row_bits_[r] = key_of(start_ + i + r, uint32_t(all_.seed));
  }
  uint32_t column_bits(int64_t j) const {
    return key_of(start_ + j, mixed(uint32_t(all_.seed >> 32) + uint32_t(head_)));
  }

  // Logits to weights, not yet divided by their sum; what was summed before goes down if the maximum goes up.
  // Source: Milakov, Gimelshein, arXiv 1805.02867.
  void normalise(int64_t i, int64_t j, int keys, int rows, Vec* top, Vec* total) {
    if (all_.dropout_p > 0) begin_dropout(i);
    alignas(64) float decay[QUERIES];
    Vec base[QUERIES / LANES], sum[QUERIES / LANES] = {};
    for (int v = 0; v < QUERIES / LANES; ++v) {
      Vec now = top[v];
      for (int c = 0; c < keys; ++c) now = larger(now, load(&s_[c * QUERIES + v * LANES]));
      base[v] = now == NONE ? Vec{} : now;  // weights 0, not nan: a finite logit may follow
      const Vec down = exponential(top[v] - base[v]);
      store(decay + v * LANES, down);
      total[v] *= down, top[v] = now;
    }
    for (int c = 0; c < keys; ++c) {
      const uint32_t column = all_.dropout_p > 0 ? column_bits(j + c) : 0;
      for (int v = 0; v < QUERIES / LANES; ++v) {
        float* x = &s_[c * QUERIES + v * LANES];
        const Vec weight = exponential(load(x) - base[v]);
        sum[v] += weight;
        store(x, all_.dropout_p > 0 ? weight * kept(v, column) : weight);
      }
    }
    for (int v = 0; v < QUERIES / LANES; ++v) total[v] += sum[v];
    for (int r = 0; r < rows && j > 0; ++r)
      for (int e = 0; e < E; ++e) o_[r * E + e] *= decay[r];
  }

  void finish(int64_t i, int rows, const Vec* top, const Vec* total, Rows out, float* lse) {
    alignas(64) float tops[QUERIES], totals[QUERIES];
    for (int v = 0; v < QUERIES / LANES; ++v) store(tops + v * LANES, top[v]), store(totals + v * LANES, total[v]);
    for (int r = 0; r < rows; ++r) {
      const float sum = totals[r];
      copy<E>(&o_[r * E], row(out, i + r), all_.size_e, 1.f / sum);
      lse[lse_at(i + r)] = tops[r] + std::log(sum);
    }
  }

  // Logits and the gradients of weights to weights after dropout, and ds = p (dp - delta).
  void find_slopes(int64_t i, int64_t j, int rows, int keys) {
    if (all_.dropout_p > 0) begin_dropout(i);
    for (int c = 0; c < keys; ++c) {
      const uint32_t column = all_.dropout_p > 0 ? column_bits(j + c) : 0;
      for (int v = 0; v < QUERIES / LANES; ++v) {
        float *s = &s_[c * QUERIES + v * LANES], *ds = &ds_[c * QUERIES + v * LANES];
        const Vec weight = exponential(load(s) - load(&norm_[v * LANES]));
        Vec slope = load(ds), dropped = weight;
        if (all_.dropout_p > 0) {
          const Vec factor = kept(v, column);
          dropped *= factor, slope *= factor;
        }
        store(s, dropped);
        store(ds, weight * (slope - load(&delta_[v * LANES])));
      }
    }
    if (own_ == NONE) each_own(i, j, rows, keys, [&](size_t at) { ds_[at] = 0.f; });  // also where others are nan
  }

  const Batches& all_;
  int64_t head_ = 0, start_ = 0, width_ = 0;
  float own_ = 0;
  alignas(64) uint32_t row_bits_[QUERIES] = {};
  alignas(64) float norm_[QUERIES] = {}, delta_[QUERIES] = {};
  Numbers k_, v_, s_, q_, qt_, o_, dk_, dv_, ds_, dq_, g_, gt_;
};

// Every task once. Where there are enough, the heads of a batch go to one thread, which has their rows in its cache.
// 0, or 1 if there was not enough memory: what is written is then without meaning.
template <class Work> int run(const Batches& all, bool backward, Work work) {
  const int64_t tasks = all.batches * all.heads, together = all.batches < 2 * all.threads ? 1 : all.heads;
  std::atomic<bool> failed{false};
  // Always as many threads as torch has: a team of another size would be made anew (pytorch/pytorch#32008).
#pragma omp parallel num_threads(all.threads) if (tasks > 1)
  {
    std::optional<Worker> worker;  // of a thread that has something to do
#pragma omp for schedule(dynamic, together)
    for (int64_t task = 0; task < tasks; ++task) {
      if (failed) continue;
      try {
        if (!worker) worker.emplace(all, backward);
        work(*worker, task);
      } catch (...) {  // std::bad_alloc, std::length_error; an exception that left the region would end the process
        failed = true;
      }
    }
  }
  return failed;
}

}  // namespace

extern "C" {

int attend_forward(const Batches* all, Rows query, Rows key, Rows value, Rows out, float* lse) {
  return run(*all, false, [&](Worker& worker, int64_t task) { worker.forward(task, query, key, value, out, lse); });
}

int attend_backward(const Batches* all, Rows grad, const float* grad_lse, Rows query, Rows key, Rows value, Rows out,
                     const float* lse, Rows to_query, Rows to_key, Rows to_value) {
  return run(*all, true, [&](Worker& worker, int64_t task) {
    worker.backward(task, grad, grad_lse, query, key, value, out, lse, to_query, to_key, to_value);
  });
}
}

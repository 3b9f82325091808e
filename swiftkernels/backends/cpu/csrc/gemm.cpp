// The kernels of gemm.h: all sums of a block stay in registers.
#include "gemm.h"

namespace swiftkernels {
namespace {

/// c = initial + bias + a b for a block of R rows and V vectors.
///
/// The compiler has to be kept from three things that each cost 10 to 30 % of the speed: addresses
/// of rows that are derived from each other (so each row has a pointer of which the compiler knows
/// nothing), sums that move between registers (so `multiply_add` works in place), and sums in
/// memory (so what is done with each of them is `unrolled`). tests/backends/test_machine_code.py
/// looks at the loop.
template <int R, int V, bool RUNS>
void multiply(const Block& block) {
  const float* a[R];
  unrolled<R>([&](auto r) INLINE_LAMBDA {
    a[r] = block.a + r * block.a_stride;
    asm("" : "+r"(a[r]));
  });
  const float* b = block.b;
  vec sums[R][V];
  const auto each_sum = [&](auto use) INLINE_LAMBDA {
    unrolled<R>([&](auto r) INLINE_LAMBDA {
      unrolled<V>([&](auto v) INLINE_LAMBDA { use(sums[r][v], r, v); });
    });
  };
  unrolled<V>([&](auto v) INLINE_LAMBDA {
    const vec bias = block.bias ? load(block.bias + v * LANES) : vec{};
    unrolled<R>([&](auto r) INLINE_LAMBDA { sums[r][v] = bias; });
  });
  const auto step = [&](int64_t k, auto i) INLINE_LAMBDA {
    vec columns[V];
    unrolled<V>([&](auto v) INLINE_LAMBDA { columns[v] = load(b + (i * V + v) * LANES); });
    unrolled<R>([&](auto r) INLINE_LAMBDA {
      const vec row = broadcast(a[r][k + i]);
      unrolled<V>([&](auto v)
                      INLINE_LAMBDA { sums[r][v] = multiply_add(sums[r][v], row, columns[v]); });
    });
  };
  constexpr std::integral_constant<int, 0> once{};
  const int64_t K = block.K;
  if constexpr (RUNS) {
    const int64_t length = K / block.runs, skip = block.run_stride - length;
    for (int64_t i = 0, k = 0, left = length; i < K; i++, b += V * LANES) {
      step(k++, once);
      if (--left == 0) k += skip, left = length;
    }
  } else {
    const int64_t chain = block.chain;
    const char* next = block.next;
    alignas(64) float totals[R * V * LANES];
    const auto total_of = [&](int r, int v) INLINE_LAMBDA { return totals + (r * V + v) * LANES; };
    int64_t k = 0, end = std::min(K, chain);
    while (true) {
      for (; k + STEP <= end; k += STEP, b += STEP * V * LANES) {
        unrolled<FETCHED / 64>([&](auto i)
                                   INLINE_LAMBDA { __builtin_prefetch(next + 64 * i, 0, 2); });
        next += FETCHED;
        unrolled<STEP>([&](auto i) INLINE_LAMBDA { step(k, i); });
      }
      if (end == K) break;
      const bool first = end == chain;
      each_sum([&](vec& sum, int r, int v) INLINE_LAMBDA {
        store(total_of(r, v), first ? sum : load(total_of(r, v)) + sum);
        sum = vec{};
      });
      end = std::min(K, end + chain);
    }
    for (; k < K; k++, b += V * LANES) step(k, once);
    if (K > chain)
      each_sum([&](vec& sum, int r, int v) INLINE_LAMBDA { sum += load(total_of(r, v)); });
  }
  if (block.initial.data)  // last, or small products would round at its size
    each_sum([&](vec& sum, int r, int v)
                 INLINE_LAMBDA { sum += load(block.initial.row(r) + v * LANES); });
  each_sum([&](vec& sum, int r, int v) INLINE_LAMBDA { store(block.c.row(r) + v * LANES, sum); });
}

/// R columns of a times V vectors of columns of b, summed over the rows in registers.
template <int R, int V>
void gram_block(const GramBlock& block) {
  vec sums[R][V] = {};
  const float* a = block.a;
  const float* b = block.b;
  const int64_t a_stride = block.a_stride, b_stride = block.b_stride;
  for (int64_t n = 0; n < block.rows; n++, a += a_stride, b += b_stride) {
    vec columns[V];
    unrolled<V>([&](auto v) INLINE_LAMBDA { columns[v] = load(b + v * LANES); });
    unrolled<R>([&](auto r) INLINE_LAMBDA {
      const vec row = broadcast(a[r]);
      unrolled<V>([&](auto v)
                      INLINE_LAMBDA { sums[r][v] = multiply_add(sums[r][v], row, columns[v]); });
    });
  }
  unrolled<R>([&](auto r) INLINE_LAMBDA {
    unrolled<V>([&](auto v) INLINE_LAMBDA {
      float* c = block.c + r * block.c_stride + v * LANES;
      store(c, block.add ? load(c) + sums[r][v] : sums[r][v]);
    });
  });
}

/// The kernels for V vectors: a kernel for each number of rows, and null above BLOCK_ROWS[V].
template <template <int, int> class Kernel, int V, int... R>
constexpr auto heights(std::integer_sequence<int, R...>) {
  return std::array<decltype(&Kernel<1, V>::run), MAX_BLOCK_ROWS>{&Kernel<R + 1, V>::run...};
}

template <template <int, int> class Kernel, int... V>
constexpr auto table(std::integer_sequence<int, V...>) {
  return std::array{
      heights<Kernel, V + 1>(std::make_integer_sequence<int, BLOCK_ROWS[V + 1]>{})...};
}

template <template <int, int> class Kernel>
constexpr auto table_of = table<Kernel>(std::make_integer_sequence<int, MAX_VECTORS>{});

template <int R, int V>
struct Adjacent {
  static void run(const Block& block) { multiply<R, V, false>(block); }
};
template <int R, int V>
struct InRuns {
  static void run(const Block& block) { multiply<R, V, true>(block); }
};
template <int R, int V>
struct Gram {
  static void run(const GramBlock& block) { gram_block<R, V>(block); }
};

}  // namespace

const BlockKernels block_kernels = table_of<Adjacent>, run_kernels = table_of<InRuns>;
const std::array<std::array<GramKernel, MAX_BLOCK_ROWS>, MAX_VECTORS> gram_kernels = table_of<Gram>;

}  // namespace swiftkernels

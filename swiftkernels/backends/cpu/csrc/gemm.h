// Matrix products on tiles of rows: rows times a packed matrix, and the Gram matrix of two tiles.
//
// A packed matrix B [K, columns] is a sequence of panels. A panel holds a group of a few vectors of
// columns, [K, width] in one block of memory, which a kernel reads from start to end. Columns are
// padded with zeros to full vectors. A group has as many vectors as fit: the sums of a block of
// rows with the group stay in registers. A is not packed: kernels broadcast one float of it at a
// time.
#pragma once

#include <algorithm>
#include <array>

#include "simd.h"

namespace swiftkernels {

/// One group of columns.
struct Panel {
  int64_t column;
  int vectors;
};

/// Divides columns into groups of almost equal width.
class Panels {
 public:
  explicit Panels(int64_t columns) {
    vectors_ = padded(columns) / LANES;
    if (MAX_VECTORS == 3)  // groups of two need the fewest loads; an odd vector makes one of three
      count_ = std::max<int64_t>(1, vectors_ / 2);
    else
      count_ = (vectors_ + MAX_VECTORS - 1) / MAX_VECTORS;
  }
  int64_t count() const { return count_; }
  Panel operator[](int64_t i) const {
    const int64_t base = vectors_ / count_, extra = vectors_ % count_;
    return {(i * base + std::min(i, extra)) * LANES, static_cast<int>(base + (i < extra))};
  }

 private:
  int64_t vectors_, count_;
};

/// Floats in the panels of B [K, columns].
constexpr int64_t panel_floats(int64_t K, int64_t columns) { return K * padded(columns); }

/// out [K, width] = the first `width` columns of B, B[k, j] = b[k * k_stride + j * j_stride], with
/// zeros from column `valid` on.
ONE_COPY inline void pack_panel(const float* b, int64_t K, int64_t k_stride, int64_t j_stride,
                                int64_t width, int64_t valid, float* out) {
  int64_t k = 0;
  if (k_stride == 1 && valid == width) {  // B is the transpose of a matrix in memory
    for (; k + LANES <= K; k += LANES)
      for (int64_t j = 0; j < width; j += LANES) {
        vec block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = load(b + (j + i) * j_stride + k);
        transpose(block);
        for (int i = 0; i < LANES; i++) store(out + (k + i) * width + j, block[i]);
      }
  } else if (j_stride == 1) {  // B is a matrix in memory
    for (; k < K && valid == width; k++)
      for (int64_t j = 0; j < width; j += LANES)
        store(out + k * width + j, load(b + k * k_stride + j));
  }
  for (; k < K; k++)
    for (int64_t j = 0; j < width; j++)
      out[k * width + j] = j < valid ? b[k * k_stride + j * j_stride] : 0.f;
}

/// A kernel multiplies STEP numbers of each row at a time, and fetches FETCHED bytes of the next
/// panel: as much as it takes to have all of it when the rows of a small image (49) are done.
constexpr int64_t STEP = 8, FETCHED = LANES >= 16 ? 256 : 64;

/// Most products that are summed one after another. Longer sums are sums of such chains: in one
/// chain, the rounding errors of wide layers would exceed those of PyTorch's products.
constexpr int64_t MAX_CHAIN = 64;

/// The length of the chains of a sum of K products, a multiple of the kernel's step. All chains
/// have about the same length.
inline int64_t chain_length(int64_t K) {
  const int64_t chains = std::max<int64_t>(1, (K + MAX_CHAIN - 1) / MAX_CHAIN);
  return round_up((K + chains - 1) / chains, STEP);
}

/// A matrix B [K, columns] to multiply with. It is packed in advance or, which is faster for few
/// rows, panel by panel during the product.
struct Matrix {
  int64_t K, columns;
  const float* panels;  // or null:
  const float* raw;     // B[k, j] = raw[k * k_stride + j * j_stride]
  int64_t k_stride, j_stride;
  int64_t chain = chain_length(K);

  static Matrix packed(const float* panels, int64_t K, int64_t columns) {
    return {K, columns, panels, nullptr, 0, 0};
  }
  /// The transpose of a weight [columns, K] in memory, as a linear layer has it.
  static Matrix transposed(const float* weight, int64_t K, int64_t columns) {
    return {K, columns, nullptr, weight, 1, K};
  }
  static Matrix rows(const float* weight, int64_t K, int64_t columns) {
    return {K, columns, nullptr, weight, columns, 1};
  }
  /// Floats of scratch for a panel that is packed during a product.
  static int64_t panel_scratch(int64_t K) { return K * MAX_VECTORS * LANES; }

  /// Pack all panels into `to` and use them from now on.
  void pack(float* to) {
    const Panels groups(columns);
    for (int64_t i = 0; i < groups.count(); i++) pack_group(groups[i], to + K * groups[i].column);
    panels = to;
  }
  /// Multiply the rows or the columns of `panels`, which are those of `pack`.
  void scale_rows(float* panels, const float* factors) const {
    for_each_vector(panels, [&](float* vector, int64_t k, int64_t) INLINE_LAMBDA {
      store(vector, load(vector) * broadcast(factors[k]));
    });
  }
  void scale_columns(float* panels, const float* factors) const {
    for_each_vector(panels, [&](float* vector, int64_t, int64_t column) INLINE_LAMBDA {
      store(vector, load(vector) * load(factors + column));
    });
  }
  /// The panel of a group; packed into `scratch` if it was not packed in advance.
  const float* panel(const Panel& group, float* scratch) const {
    if (panels) return panels + K * group.column;
    pack_group(group, scratch);
    return scratch;
  }

 private:
  void pack_group(const Panel& group, float* to) const {
    const int64_t width = group.vectors * LANES;
    pack_panel(raw + group.column * j_stride, K, k_stride, j_stride, width,
               std::min(width, columns - group.column), to);
  }

  /// use(vector, row, column)
  template <class Use>
  void for_each_vector(float* panels, Use use) const {
    const Panels groups(columns);
    for (int64_t i = 0; i < groups.count(); i++)
      for (int64_t k = 0; k < K; k++)
        for (int v = 0; v < groups[i].vectors; v++, panels += LANES)
          use(panels, k, groups[i].column + v * LANES);
  }
};

/// Rows from which on it pays to pack a matrix in advance.
constexpr int64_t PACK_FROM = 512;

/// The operands of a block of rows and a group of columns; pointers are to its first row and
/// column.
struct Block {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t K, chain;
  const float* bias;  // [width] or null
  Tile initial;       // added to the product, [rows, width], or without data
  Tile c;
  int64_t columns;   // of c that may be written: the last vector may be partly padding
  const char* next;  // what is read after b, which is fetched meanwhile
  // The K numbers of a row of a are `runs` times equally many adjacent ones, `run_stride` apart.
  int64_t runs = 1, run_stride = 0;

  /// Continue with the rows from r on.
  void advance(int64_t r) {
    a += r * a_stride;
    c = c.from(r);
    next += K / STEP * FETCHED;
    if (initial.data) initial = initial.from(r);
  }
};

using BlockKernel = void (*)(const Block&);

/// Kernels by vectors - 1 and rows - 1 (gemm.cpp): for adjacent numbers of a, and for runs of them.
using BlockKernels = std::array<std::array<BlockKernel, MAX_BLOCK_ROWS>, MAX_VECTORS>;
extern const BlockKernels block_kernels, run_kernels;

/// c = initial + bias + a b for a block of `rows` rows, at most BLOCK_ROWS[vectors].
inline void multiply_block(const Block& block, int vectors, int64_t rows) {
  const BlockKernel kernel = (block.runs > 1 ? run_kernels : block_kernels)[vectors - 1][rows - 1];
  if (block.columns >= vectors * LANES) return kernel(block);
  alignas(64) float memory[MAX_BLOCK_FLOATS];
  Block whole = block;
  whole.c = {memory, vectors * LANES};
  kernel(whole);
  for (int64_t r = 0; r < rows; r++)
    std::memcpy(block.c.row(r), whole.c.row(r), block.columns * sizeof(float));
}

/// Call use(first, height) for blocks of rows, of almost equal height: a short last block would
/// have too few independent sums to keep the multipliers busy.
template <class Use>
INLINE void for_row_blocks(int64_t rows, int64_t highest, Use use) {
  const int64_t count = (rows + highest - 1) / highest;
  const int64_t base = rows / std::max<int64_t>(1, count), higher = rows - base * count;
  for (int64_t i = 0, first = 0; i < count; i++) {
    const int64_t height = base + (i < higher);
    use(first, height);
    first += height;
  }
}

/// c = initial + bias + a b for a group of columns. Then `finish(part, rows)` is called for each
/// block of rows while it is in the first-level cache.
template <class Finish>
INLINE void multiply_panel(Block block, int vectors, int64_t rows, Finish finish) {
  for_row_blocks(rows, BLOCK_ROWS[vectors], [&](int64_t, int64_t height) {
    multiply_block(block, vectors, height);
    finish(block.c, height);
    block.advance(height);
  });
}

/// Rows of a that stay in the second-level cache (192 KB, at least 48 rows) while all panels of b
/// are multiplied.
inline int64_t cached_rows(int64_t K) { return std::max<int64_t>(48, 49152 / K); }

/// The memory after the panel of a group: the next panel, or what was packed after the matrix. The
/// weights of wide layers come from memory, so they are fetched in advance.
inline const char* after(const Matrix& b, const Panel& group) {
  const float* panels = b.panels ? b.panels : b.raw;
  return reinterpret_cast<const char*>(panels + b.K * (group.column + group.vectors * LANES));
}

/// The left operand of a product: rows of K numbers, `stride` apart. The K numbers are `runs` times
/// equally many adjacent ones, `run_stride` apart.
struct Rows {
  const float* data;
  int64_t stride;
  int64_t runs = 1, run_stride = 0;

  Rows(Tile tile) : data(tile.data), stride(tile.stride) {}
  Rows(const float* data, int64_t stride, int64_t runs, int64_t run_stride)
      : data(data), stride(stride), runs(runs), run_stride(run_stride) {}
};

/// c [rows, columns] = initial + bias + a [rows, K] b. Then `finish(part, rows, width)` is called
/// for parts of c while they are in the first-level cache. `c_padded`: rows of c may be overwritten
/// up to full vectors. `scratch` is for a panel of b, and may be null if b is packed.
template <class Finish>
INLINE void gemm_and(const Rows& a, int64_t rows, const Matrix& b, const float* bias, Tile c,
                     float* scratch, Tile initial, bool c_padded, Finish finish) {
  const Panels groups(b.columns);
  const int64_t writable = c_padded ? padded(b.columns) : b.columns;
  const int64_t parts = b.panels ? (rows + cached_rows(b.K) - 1) / cached_rows(b.K) : 1;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = rows * part / parts, end = rows * (part + 1) / parts;
    for (int64_t i = 0; i < groups.count(); i++) {
      const Panel group = groups[i];
      const int64_t column = group.column, width = group.vectors * LANES;
      const Block block{a.data + first * a.stride,
                        a.stride,
                        b.panel(group, scratch),
                        b.K,
                        b.chain,
                        bias ? bias + column : nullptr,
                        initial.data ? Tile{initial.row(first) + column, initial.stride} : Tile{},
                        {c.row(first) + column, c.stride},
                        writable - column,
                        after(b, group),
                        a.runs,
                        a.run_stride};
      multiply_panel(block, group.vectors, end - first,
                     [&](Tile part, int64_t height) INLINE_LAMBDA { finish(part, height, width); });
    }
  }
}

/// The same without `finish`.
inline void gemm(Tile a, int64_t rows, const Matrix& b, const float* bias, Tile c, float* scratch,
                 Tile initial = {}, bool c_padded = true) {
  gemm_and(a, rows, b, bias, c, scratch, initial, c_padded, [](Tile, int64_t, int64_t) {});
}

/// The same with c and `initial` packed: rows from `first` on of panels of `panel_rows` rows.
inline void gemm_to_panels(Tile a, int64_t rows, const Matrix& b, float* c, int64_t panel_rows,
                           int64_t first, float* scratch, const float* initial = nullptr) {
  const Panels groups(b.columns);
  for (int64_t i = 0; i < groups.count(); i++) {
    const Panel group = groups[i];
    const int64_t width = group.vectors * LANES;
    const int64_t offset = panel_rows * group.column + first * width;
    const Block block{a.data,
                      a.stride,
                      b.panel(group, scratch),
                      b.K,
                      b.chain,
                      nullptr,
                      initial ? Tile{const_cast<float*>(initial) + offset, width} : Tile{},
                      {c + offset, width},
                      width,
                      after(b, group)};
    multiply_panel(block, group.vectors, rows, [](Tile, int64_t) {});
  }
}

/// sums[r] = the sum of the lanes of vector_of(r). LANES rows at a time need far fewer shuffles
/// than one row at a time.
template <class VectorOf>
INLINE void sum_each_row(int64_t rows, float* sums, VectorOf vector_of) {
  for (int64_t r = 0; r < rows; r += LANES) {
    // The last rows run the same code: other code might round differently.
    const int64_t count = std::min<int64_t>(LANES, rows - r);
    vec vectors[LANES] = {};
    for (int64_t i = 0; i < count; i++) vectors[i] = vector_of(r + i);
    alignas(sizeof(vec)) float block[LANES];
    store(block, sums_of(vectors));
    std::memcpy(sums + r, block, count * sizeof(float));
  }
}

/// norms2[t][r] = |bias_t + a[r] b_t|^2 for `count` matrices b_t [K, columns], one or two, of which
/// column j is zero above row j. A panel has one vector of columns of each of two matrices, or two
/// of one, without the rows above its first column; biases lie in the same order. `scratch` holds
/// `count` vectors for each row.
inline void triangular_norms2(Tile a, int64_t rows, const float* panels, const float* biases,
                              int64_t K, int64_t columns, int count, float* scratch,
                              float* const* norms2) {
  std::fill(scratch, scratch + rows * count * LANES, 0.f);
  const int64_t step = 2 / count * LANES;
  for (int64_t column = 0; column < columns; column += step) {
    const int64_t first = std::min(column, K);
    const int each = static_cast<int>(std::min(step, padded(columns - column)) / LANES);
    const int vectors = count * each;
    const float* end = panels + (K - first) * vectors * LANES;
    alignas(64) float memory[MAX_BLOCK_FLOATS];
    const Tile sums{memory, vectors * LANES};
    Block block{
        a.data + first, a.stride, panels, K - first,       chain_length(K - first),
        biases,         {},       sums,   vectors * LANES, reinterpret_cast<const char*>(end)};
    for_row_blocks(rows, BLOCK_ROWS[vectors], [&](int64_t begin, int64_t height) {
      multiply_block(block, vectors, height);
      block.advance(height);
      block.c = sums;
      for (int64_t r = 0; r < height; r++)
        for (int v = 0; v < vectors; v++) {
          float* squares = scratch + ((begin + r) * count + v / each) * LANES;
          const vec value = load(sums.row(r) + v * LANES);
          store(squares, load(squares) + value * value);
        }
    });
    panels = end, biases += vectors * LANES;
  }
  for (int t = 0; t < count; t++)
    sum_each_row(rows, norms2[t],
                 [&](int64_t r) { return load(scratch + (r * count + t) * LANES); });
}

/// The operands of a block of a Gram matrix.
struct GramBlock {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t rows;
  float* c;
  int64_t c_stride;
  bool add;  // to c
};

/// Kernels by vectors - 1 and columns of a - 1 (gemm.cpp).
using GramKernel = void (*)(const GramBlock&);
extern const std::array<std::array<GramKernel, MAX_BLOCK_ROWS>, MAX_VECTORS> gram_kernels;

/// Copy the columns of a as `gram_panel` reads them: block by block.
inline void pack_columns(Tile a, int64_t a_columns, int64_t rows, int block_columns, float* to) {
  for_row_blocks(a_columns, block_columns, [&](int64_t first, int64_t height) {
    for (int64_t n = 0; n < rows; n++)
      for (int64_t r = 0; r < height; r++) *to++ = a.row(n)[first + r];
  });
}

/// Tiles of more floats (256 KB) are packed before their columns are multiplied: their rows are too
/// far apart for the cache.
constexpr int64_t LARGE_TILE = 65536;

/// `packed`: by `pack_columns`.
inline void gram_panel(GramBlock block, int vectors, int64_t a_columns, bool packed) {
  for_row_blocks(a_columns, BLOCK_ROWS[vectors], [&](int64_t, int64_t height) {
    if (packed) block.a_stride = height;
    gram_kernels[vectors - 1][height - 1](block);
    block.a += packed ? height * block.rows : height;
    block.c += height * block.c_stride;
  });
}

/// c [a_columns, b_columns] = a^T b, or c += a^T b if `add`, for tiles a and b of `rows` rows. Rows
/// of b and c are padded to full vectors. `scratch` has the size of a, if a is larger than
/// LARGE_TILE.
inline void gram(Tile a, int64_t a_columns, Tile b, int64_t b_columns, int64_t rows, Tile c,
                 bool add, float* scratch) {
  const Panels groups(b_columns);
  const bool packed = rows * a.stride > LARGE_TILE;
  int packed_for = 0;
  for (int64_t i = 0; i < groups.count(); i++) {
    const Panel group = groups[i];
    if (packed && BLOCK_ROWS[group.vectors] != packed_for) {
      packed_for = BLOCK_ROWS[group.vectors];
      pack_columns(a, a_columns, rows, packed_for, scratch);
    }
    const GramBlock block{packed ? scratch : a.data,
                          a.stride,
                          b.data + group.column,
                          b.stride,
                          rows,
                          c.data + group.column,
                          c.stride,
                          add};
    gram_panel(block, group.vectors, a_columns, packed);
  }
}

/// The upper triangle, and some of the rest, of a symmetric a^T b of tiles up to LARGE_TILE.
inline void gram_upper(Tile a, Tile b, int64_t columns, int64_t rows, Tile c, bool add) {
  const Panels groups(columns);
  for (int64_t i = 0; i < groups.count(); i++) {
    const Panel group = groups[i];
    const int64_t end = group.column + group.vectors * LANES;
    const GramBlock block{a.data,   a.stride, b.data + group.column,
                          b.stride, rows,     c.data + group.column,
                          c.stride, add};
    gram_panel(block, group.vectors, std::min(columns, end), false);
  }
}

}  // namespace swiftkernels

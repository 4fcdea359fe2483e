// LoRA of a decode step on the CPU, in float32: each segment of the packed row through its own adapter, for all layers
// that read one tensor. Weights are read where they lie, in order, and once for all rows of a segment.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kColumns = 1024;   // of an output at a time: they stay in the first cache while all ranks are added
constexpr int64_t kGrain = 16384;    // multiplications for which another thread is worth waking
constexpr int64_t kRowsAhead = 12;   // of A, to be fetched: the last step was long ago, so no cache has them
constexpr int64_t kPiecesAhead = 1;  // of B, all of it
constexpr int64_t kFirst = 256;      // columns of B that are fetched with A's rows
constexpr int64_t kLine = 64 / sizeof(float);  // of a cache

// What one segment has of one layer: rows `start` to `end`, A [rank, inputs], B [rank, outputs].
struct Part {
  int64_t layer, start, end, rank;
  const float *a, *b;
  float scale;
  int64_t first;  // where its x A.T [rows, rank] begins among all of them
};

struct Piece {
  const Part* part;
  int64_t begin;  // a rank, or a column
};

// d[row * pitch] = scale * (x[row] . a) of `R` rows of x, `stride` apart.
template <int64_t R>
void dot(const float* __restrict__ x, int64_t stride, const float* __restrict__ a, int64_t n, float scale, float* d,
         int64_t pitch) {
  float sums[R] = {};
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i)
    for (int64_t row = 0; row < R; ++row) sums[row] += x[row * stride + i] * a[i];
  for (int64_t row = 0; row < R; ++row) d[row * pitch] = scale * sums[row];
}

// y [n] += d[0] b[0] + d[1] b[1] + ..., of `rank` rows of b, `stride` apart.
void add(float* __restrict__ y, const float* d, const float* __restrict__ b, int64_t rank, int64_t stride, int64_t n) {
  int64_t k = 0;
  for (; k + 4 <= rank; k += 4) {
    const float *b0 = b + k * stride, *b1 = b0 + stride, *b2 = b1 + stride, *b3 = b2 + stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] += d[k] * b0[i] + d[k + 1] * b1[i] + d[k + 2] * b2[i] + d[k + 3] * b3[i];
  }
  for (; k < rank; ++k) {
    const float* bk = b + k * stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] += d[k] * bk[i];
  }
}

void fetch(const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// `come` is called for a piece some time before `work` is.
template <typename Work, typename Come>
void in_parallel(const std::vector<Piece>& pieces, int64_t cost, int64_t ahead, const Work& work, const Come& come) {
  at::parallel_for(0, pieces.size(), std::max<int64_t>(1, kGrain / cost), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (p + ahead < end) come(*pieces[p + ahead].part, pieces[p + ahead].begin);
      work(*pieces[p].part, pieces[p].begin);
    }
  });
}

// x [tokens, inputs]; outputs [tokens, outputs of the layer] each, added to in place. Of every segment: bounds [3] are
// its first row, the row behind its last, and its rank; addresses [2 * layers] are A and B of each layer, 0 where the
// adapter leaves it alone; scales its alpha / rank.
void add_lora(const at::Tensor& x, at::TensorList outputs, const at::Tensor& bounds, const at::Tensor& addresses,
              const at::Tensor& scales) {
  const int64_t inputs = x.size(1), layers = static_cast<int64_t>(outputs.size());
  const auto* from = x.const_data_ptr<float>();
  const auto* bound = bounds.const_data_ptr<int64_t>();
  const auto* address = addresses.const_data_ptr<int64_t>();
  std::vector<Part> parts;
  int64_t size = 0;
  for (int64_t s = 0; s < bounds.size(0); ++s, bound += 3)
    for (int64_t layer = 0; layer < layers; ++layer, address += 2) {
      if (address[0] == 0) continue;
      parts.push_back({layer, bound[0], bound[1], bound[2], reinterpret_cast<const float*>(address[0]),
                       reinterpret_cast<const float*>(address[1]), scales.const_data_ptr<float>()[s], size});
      size += (bound[1] - bound[0]) * bound[2];
    }
  std::vector<Piece> ranks, columns;
  for (const Part& part : parts) {
    for (int64_t k = 0; k < part.rank; ++k) ranks.push_back({&part, k});
    for (int64_t c = 0; c < outputs[part.layer].size(1); c += kColumns) columns.push_back({&part, c});
  }
  std::vector<float> downs(size);
  const auto times_a = [&](const Part& part, int64_t k) {
    const float* a = part.a + k * inputs;
    float* down = downs.data() + part.first + k;
    int64_t row = part.start;
    for (; row + 4 <= part.end; row += 4, down += 4 * part.rank)
      dot<4>(from + row * inputs, inputs, a, inputs, part.scale, down, part.rank);
    for (; row < part.end; ++row, down += part.rank)
      dot<1>(from + row * inputs, inputs, a, inputs, part.scale, down, part.rank);
  };
  const auto times_b = [&](const Part& part, int64_t c) {
    const at::Tensor& output = outputs[part.layer];
    const int64_t width = output.size(1), n = std::min(kColumns, width - c);
    const float* down = downs.data() + part.first;
    for (int64_t row = part.start; row < part.end; ++row, down += part.rank)
      add(output.data_ptr<float>() + row * output.stride(0) + c, down, part.b + c, part.rank, width, n);
  };
  in_parallel(ranks, inputs, kRowsAhead, times_a, [&](const Part& part, int64_t k) {
    const int64_t width = outputs[part.layer].size(1);
    fetch(part.a + k * inputs, inputs);
    fetch(part.b + k * width, std::min(width, kFirst));
  });
  in_parallel(columns, 8 * kColumns, kPiecesAhead, times_b, [&](const Part& part, int64_t c) {
    const int64_t width = outputs[part.layer].size(1), n = std::min(kColumns, width - c);
    for (int64_t k = 0; k < part.rank; ++k) fetch(part.b + k * width + c, n);
  });
}

}  // namespace

TORCH_LIBRARY(lorry_cpu, library) {
  library.def("add_lora(Tensor x, Tensor(a!)[] outputs, Tensor bounds, Tensor addresses, Tensor scales) -> ()");
}

TORCH_LIBRARY_IMPL(lorry_cpu, CPU, library) { library.impl("add_lora", &add_lora); }

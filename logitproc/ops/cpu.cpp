// Operations on a CPU, one function each.

#include "aligndistil.h"
#include "divergences.h"
#include "fusion.h"
#include "history.h"
#include "planes.h"
#include "rows.h"
#include "spread.h"
#include "tilt.h"
#include "vq.h"

extern "C" {

// scores [rows, width], target [rows] -> out [rows]
void nll(const float* scores, const int64_t* target, float* out, int64_t rows, int64_t width, int64_t threads) {
  for_rows(rows, width, threads, [=](int64_t row) {
    const float* x = scores + row * width;
    const float top = maximum(x, width);
    out[row] = std::log(sum_of_exp(x, width, top)) - (x[target[row]] - top);
  });
}

}  // extern "C"

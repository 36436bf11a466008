// The launchers of the kernels by their definition, on memory of a CPU: what their structs say is all that it
// reads and writes. Linked with csrc/bindings.cpp it makes a module that Python cannot tell from the compiled one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "memformer_kernels/memory_forget.h"
#include "memformer_kernels/memory_read.h"
#include "memformer_kernels/memory_write.h"

extern "C" const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "not supported";
}

namespace memformer_kernels {
namespace {

float widen(__half value) { return __half2float(value); }
float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
void narrow(float value, __half* to) { *to = __float2half_rn(value); }
void narrow(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }
void narrow(float value, float* to) { *to = value; }

// [B, H, rows, D] at any strides.
template <typename T>
struct Rows {
  const T* data;
  const int64_t (&stride)[4];
  explicit Rows(const Strided<4>& tensor) : data(static_cast<const T*>(tensor.data)), stride(tensor.stride) {}
  double operator()(int64_t b, int64_t h, int64_t row, int64_t c) const {
    return widen(data[b * stride[0] + h * stride[1] + row * stride[2] + c * stride[3]]);
  }
  // Whether TMA would copy it.
  bool in_vectors(int64_t B, int64_t H, int64_t rows) const {
    const int64_t sizes[3] = {B, H, rows};
    bool takes = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[3] == 1;
    for (int i = 0; i < 3; ++i) takes = takes && (sizes[i] == 1 || (stride[i] > 0 && stride[i] % 8 == 0));
    return takes;
  }
};

template <typename T>
double dot(const Rows<T>& a, int64_t i, const Rows<T>& b, int64_t j, int64_t batch, int64_t head, int D) {
  double sum = 0;
  for (int c = 0; c < D; ++c) sum += a(batch, head, i, c) * b(batch, head, j, c);
  return sum;
}

bool is_visible(const Mask& mask, int64_t batch, int64_t at) {
  return mask.data == nullptr || mask.data[batch * mask.stride[0] + at * mask.stride[1]];
}

template <typename T>
cudaError_t read_forward(const MemoryReadForwardParams& p) {
  const Rows<T> query(p.query), key(p.key), value(p.value);
  if (p.D % 8 != 0 || !query.in_vectors(p.B, p.H, p.L) || !key.in_vectors(p.B, p.H, p.M) ||
      !value.in_vectors(p.B, p.H, p.M)) {
    return cudaErrorInvalidValue;
  }
  const double scale = p.log2_scale * std::log(2.0);
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t l = 0; l < p.L; ++l) {
        std::vector<double> weight(p.M), sum(p.D);
        double top = -INFINITY, total = 0;
        for (int64_t m = 0; m < p.M; ++m) {
          weight[m] = is_visible(p.slot_mask, b, m) ? dot(query, l, key, m, b, h, p.D) : -INFINITY;
          top = std::max(top, weight[m]);
        }
        for (int64_t m = 0; m < p.M && top > -INFINITY; ++m) {
          if (weight[m] == -INFINITY) continue;
          const double w = std::exp(scale * (weight[m] - top));
          total += w;
          for (int c = 0; c < p.D; ++c) sum[c] += w * value(b, h, m, c);
        }
        if (p.log_sum_exp != nullptr) {
          p.log_sum_exp[(b * p.H + h) * p.L + l] = total > 0 ? top + std::log(total) / scale : 0;
        }
        for (int c = 0; c < p.D; ++c) {
          const int64_t at = ((b * p.L + l) * p.H + h) * p.D + c;
          const float exact = total > 0 ? sum[c] / total : 0;
          T rounded, lost;
          narrow(exact, &rounded);
          narrow(exact - widen(rounded), &lost);
          static_cast<T*>(p.output)[at] = rounded;
          if (p.rounding != nullptr) static_cast<T*>(p.rounding)[at] = lost;
        }
      }
  return cudaSuccess;
}

// What rows take from keys, and what comes back: of a head, over the rows from `first` to `last`.
struct Gradients {
  std::vector<double> query, key, value;
};
template <typename T, typename Delta>
Gradients differentiate(const Rows<T>& query, const Rows<T>& grad, const Rows<T>& key, const Rows<T>& value, int64_t b,
                        int64_t h, int64_t rows, int64_t first_key, int64_t last_key, int64_t first, int64_t last,
                        int D, double scale, const Mask& mask, const float* log_sum_exp, Delta delta) {
  Gradients g{std::vector<double>(rows * D), std::vector<double>(last_key * D), std::vector<double>(last_key * D)};
  for (int64_t i = first; i < last; ++i) {
    std::vector<double> weight(last_key), weight_grad(last_key);
    for (int64_t j = first_key; j < last_key; ++j) {
      if (!is_visible(mask, b, j)) continue;
      weight[j] = std::exp(scale * (dot(query, i, key, j, b, h, D) - log_sum_exp[i]));
      weight_grad[j] = dot(grad, i, value, j, b, h, D);
    }
    const double of_row = delta(i, weight, weight_grad);
    for (int64_t j = first_key; j < last_key; ++j) {
      if (!is_visible(mask, b, j)) continue;
      const double score = weight[j] * (weight_grad[j] - of_row);
      for (int c = 0; c < D; ++c) {
        g.query[i * D + c] += score * key(b, h, j, c);
        g.key[j * D + c] += scale * score * query(b, h, i, c);
        g.value[j * D + c] += weight[j] * grad(b, h, i, c);
      }
    }
  }
  return g;
}

template <typename T>
cudaError_t read_backward(const MemoryReadBackwardParams& p) {
  const Rows<T> grad(p.grad_output), query(p.query);
  const Rows<T> key(p.key), value(p.value);
  const bool alone = p.M <= kMemoryReadBackwardAlone;
  const bool fits = p.D % 8 == 0 && p.chunk % kMemoryReadBackwardTokens == 0 && grad.in_vectors(p.B, p.H, p.L) &&
                    query.in_vectors(p.B, p.H, p.L) && key.in_vectors(p.B, p.H, p.M) &&
                    value.in_vectors(p.B, p.H, p.M);
  const bool given = !alone && p.output == nullptr, sums = p.grad_query == nullptr;
  if (!fits || (p.statistics == nullptr) != alone || (alone && p.output != nullptr) || (alone && sums) ||
      (p.carry == nullptr) != (p.M <= kMemoryReadBackwardSlots && !sums)) {
    return cudaErrorInvalidValue;
  }
  constexpr int64_t kTile = kMemoryReadBackwardTokens;
  const int64_t tiles = (p.L + kTile - 1) / kTile;
  const int64_t chunks = (p.L + p.chunk - 1) / p.chunk;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = chunk * p.chunk, last = std::min(p.L, first + p.chunk);
        const float* statistics = p.statistics + (b * p.H + h) * tiles * 2 * kTile;  // of which 64, then 64 of delta
        std::vector<float> given_log_sum_exp(p.L);
        for (int64_t l = 0; l < p.L && given; ++l) given_log_sum_exp[l] = statistics[l / kTile * 2 * kTile + l % kTile];
        const auto delta = [&](int64_t l, const std::vector<double>& weight, const std::vector<double>& weight_grad) {
          double sum = 0;
          if (given) return static_cast<double>(statistics[l / kTile * 2 * kTile + kTile + l % kTile]);
          if (alone) {
            for (int64_t m = 0; m < p.M; ++m) sum += weight[m] * weight_grad[m];
            return sum;
          }
          for (int c = 0; c < p.D; ++c) {
            const int64_t at = ((b * p.L + l) * p.H + h) * p.D + c;
            const double output = widen(static_cast<const T*>(p.output)[at]);
            sum += grad(b, h, l, c) * (output + widen(static_cast<const T*>(p.rounding)[at]));
          }
          return sum;
        };
        const float* log_sum_exp = given ? given_log_sum_exp.data() : p.log_sum_exp + (b * p.H + h) * p.L;
        const Gradients g = differentiate(query, grad, key, value, b, h, p.L, 0, p.M, first, last, p.D, p.scale,
                                          p.slot_mask, log_sum_exp, delta);
        for (int64_t l = first; l < last; ++l)
          for (int c = 0; c < p.D; ++c) {
            const int64_t at = ((b * p.L + l) * p.H + h) * p.D + c;
            if (sums) {
              p.carry[at] = g.query[l * p.D + c];
            } else {
              narrow(p.scale * g.query[l * p.D + c], static_cast<T*>(p.grad_query) + at);
            }
          }
        for (int64_t m = 0; m < p.M; ++m)
          for (int c = 0; c < p.D; ++c) {
            const int64_t at = (((chunk * p.B + b) * p.M + m) * p.H + h) * p.D + c;
            if (chunks == 1) {
              narrow(g.key[m * p.D + c], static_cast<T*>(p.grad_key) + at);
              narrow(g.value[m * p.D + c], static_cast<T*>(p.grad_value) + at);
            } else {
              narrow(g.key[m * p.D + c], static_cast<float*>(p.grad_key) + at);
              narrow(g.value[m * p.D + c], static_cast<float*>(p.grad_value) + at);
            }
          }
      }
  return cudaSuccess;
}

template <typename T>
cudaError_t write_forward(const MemoryWriteForwardParams& p) {
  const Rows<T> query(p.query), own_key(p.own_key), key(p.key), value(p.value), narrow_slots(p.slots);
  const auto wide_slot = [&](int64_t b, int64_t h, int64_t m, int c) {
    const auto& stride = p.slots.stride;
    return static_cast<const float*>(p.slots.data)[b * stride[0] + h * stride[1] + m * stride[2] + c * stride[3]];
  };
  if (p.D % 8 != 0 || p.chunk % kMemoryWriteForwardTokens != 0 || p.L == 0 || !query.in_vectors(p.B, p.H, p.M) ||
      !own_key.in_vectors(p.B, p.H, p.M) || !narrow_slots.in_vectors(p.B, p.H, p.M) ||
      !key.in_vectors(p.B, p.H, p.L) || !value.in_vectors(p.B, p.H, p.L) ||
      (p.slots_dtype != p.dtype && p.slots_dtype != DType::kFloat32)) {
    return cudaErrorInvalidValue;
  }
  const double scale = p.log2_scale * std::log(2.0);
  const int64_t chunks = (p.L + p.chunk - 1) / p.chunk, part_rows = p.B * p.H * p.M;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t m = 0; m < p.M; ++m) {
        const int64_t row = (b * p.H + h) * p.M + m;
        const double own = dot(query, m, own_key, m, b, h, p.D);
        p.own_logit[row] = own;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          std::vector<double> logit, sum(p.D);
          std::vector<int64_t> token;
          double top = chunk == 0 ? own : -INFINITY, total = 0;
          for (int64_t l = chunk * p.chunk; l < std::min(p.L, (chunk + 1) * p.chunk); ++l) {
            if (!is_visible(p.token_mask, b, l)) continue;
            token.push_back(l), logit.push_back(dot(query, m, key, l, b, h, p.D));
            top = std::max(top, logit.back());
          }
          for (size_t i = 0; i < token.size(); ++i) {
            const double weight = std::exp(scale * (logit[i] - top));
            total += weight;
            for (int c = 0; c < p.D; ++c) sum[c] += weight * value(b, h, token[i], c);
          }
          const double own_weight = chunk == 0 ? std::exp(scale * (own - top)) : 0;
          for (int c = 0; c < p.D && chunk == 0; ++c) {
            const bool wide = p.slots_dtype == DType::kFloat32;
            const double slot = own_weight * (wide ? wide_slot(b, h, m, c) : narrow_slots(b, h, m, c));
            sum[c] = token.empty() ? slot : sum[c] + slot;  // to the sign of zero
          }
          p.top[chunk * part_rows + row] = top;
          p.total[chunk * part_rows + row] = total + own_weight;
          for (int c = 0; c < p.D; ++c) p.acc[(((chunk * p.B + b) * p.M + m) * p.H + h) * p.D + c] = sum[c];
        }
      }
  return cudaSuccess;
}

template <typename T>
cudaError_t write_backward(const MemoryWriteBackwardParams& p) {
  const Rows<T> query(p.query), du(p.du);
  const Rows<T> key(p.key), value(p.value);
  if (p.D % 8 != 0 || p.chunk % 64 != 0 || p.M > kMemoryWriteBackwardSlots || !query.in_vectors(p.B, p.H, p.M) ||
      !du.in_vectors(p.B, p.H, p.M) || !key.in_vectors(p.B, p.H, p.L) || !value.in_vectors(p.B, p.H, p.L)) {
    return cudaErrorInvalidValue;
  }
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t chunk = 0; chunk * p.chunk < p.L; ++chunk) {
        const int64_t first = chunk * p.chunk, last = std::min(p.L, first + p.chunk), head = (b * p.H + h) * p.M;
        const auto delta = [&](int64_t m, const auto&, const auto&) { return p.delta[head + m]; };
        const Gradients g = differentiate(query, du, key, value, b, h, p.M, first, last, 0, p.M, p.D, p.scale,
                                          p.token_mask, p.log_sum_exp + head, delta);
        for (int c = 0; c < p.D; ++c) {
          for (int64_t m = 0; m < p.M; ++m)
            p.partial[(((chunk * p.B + b) * p.M + m) * p.H + h) * p.D + c] = g.query[m * p.D + c];
          for (int64_t l = first; l < last; ++l) {
            const int64_t at = ((b * p.L + l) * p.H + h) * p.D + c;
            narrow(g.key[l * p.D + c], static_cast<T*>(p.grad_key) + at);
            narrow(g.value[l * p.D + c], static_cast<T*>(p.grad_value) + at);
          }
        }
      }
  return cudaSuccess;
}

template <typename T>
cudaError_t forget_forward(const MemoryForgetForwardParams& p) {
  const auto at = [](const auto& tensor, int64_t i, int64_t j, int64_t k) {
    return static_cast<const T*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1] + k * tensor.stride[2];
  };
  const Strided<3> bias{p.bias.data, {0, p.bias.stride[0], p.bias.stride[1]}};
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t m = 0; m < p.M; ++m) {
      double sum = 0;
      std::vector<double> z(p.C);
      for (int c = 0; c < p.C; ++c) z[c] = widen(*at(p.slots, b, m, c)) + widen(*at(bias, b, m, c)), sum += z[c] * z[c];
      const float inverse = std::min(1 / std::sqrt(sum), double(p.inv_eps));
      p.inv_norm[b * p.M + m] = inverse;
      for (int c = 0; c < p.C; ++c) narrow(z[c] * inverse, static_cast<T*>(p.output) + (b * p.M + m) * p.C + c);
    }
  return cudaSuccess;
}

template <typename T>
cudaError_t forget_backward(const MemoryForgetBackwardParams& p) {
  const auto at = [](const auto& tensor, int64_t i, int64_t j, int64_t k) {
    return widen(static_cast<const T*>(
        tensor.data)[i * tensor.stride[0] + j * tensor.stride[1] + k * tensor.stride[2]]);
  };
  const Strided<3> bias{p.bias.data, {0, p.bias.stride[0], p.bias.stride[1]}};
  std::vector<double> of_bias(p.M * p.C);
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t m = 0; m < p.M; ++m) {
      const double inverse = p.inv_norm[b * p.M + m];
      double along = 0;
      for (int c = 0; c < p.C; ++c) {
        along += at(p.grad_output, b, m, c) * (at(p.slots, b, m, c) + at(bias, b, m, c)) * inverse;
      }
      if (inverse >= p.inv_eps) along = 0;  // below the floor the norm does not move
      for (int c = 0; c < p.C; ++c) {
        const double z = at(p.slots, b, m, c) + at(bias, b, m, c);
        const double grad = inverse * (at(p.grad_output, b, m, c) - along * z * inverse);
        narrow(grad, static_cast<T*>(p.grad_slots) + (b * p.M + m) * p.C + c);
        of_bias[m * p.C + c] += grad;
      }
    }
  for (int64_t i = 0; i < p.M * p.C; ++i) narrow(of_bias[i], static_cast<T*>(p.grad_bias) + i);
  return p.groups > 1 && p.partial == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename Params, typename Half, typename BFloat16>
cudaError_t dispatch(const Params* p, Half half, BFloat16 bfloat16) {
  if (p->dtype == DType::kFloat32) return cudaErrorNotSupported;
  return p->dtype == DType::kFloat16 ? half(*p) : bfloat16(*p);
}

}  // namespace

#define MK_LAUNCHER(name, function, Params) \
  extern "C" cudaError_t name(const Params* p) { return dispatch(p, function<__half>, function<__nv_bfloat16>); }
MK_LAUNCHER(memory_read_forward, read_forward, MemoryReadForwardParams)
MK_LAUNCHER(memory_read_backward, read_backward, MemoryReadBackwardParams)
MK_LAUNCHER(memory_write_forward, write_forward, MemoryWriteForwardParams)
MK_LAUNCHER(memory_write_backward, write_backward, MemoryWriteBackwardParams)
MK_LAUNCHER(memory_forget_forward, forget_forward, MemoryForgetForwardParams)
MK_LAUNCHER(memory_forget_backward, forget_backward, MemoryForgetBackwardParams)
#undef MK_LAUNCHER

}  // namespace memformer_kernels

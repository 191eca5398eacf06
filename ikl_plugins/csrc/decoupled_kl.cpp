// DKL, IKL and GKL of (N, C) logits on a CPU: values and gradients in one call.
//
// The same formulas as ikl_plugins/functional.py, which says where they come from; that file is the reference, this one
// only passes fewer times over memory. With d = t - s, weights w, W = sum_j w_j and m = sum_j w_j d_j / W, per row:
//
//     weighted MSE   E = 1/2 W sum_j w_j (d_j - m)^2         dE/dt_i = W w_i (d_i - m) = -dE/ds_i
//     cross entropy  H = -sum_j p_j log q_j                  dH/ds_i = (q_i - p_i) / T
//
// Three passes over a row: its maxima; exponentials and their sums; what depends on these sums. GKL's normaliser is one
// number for the batch and takes a pass over all rows before that. Rows are independent of each other and of the number
// of threads, and the sums over them run in order: so do not the results depend on it.
//
// Plain C++ without torch: ikl_plugins/native.py hands over addresses, and one library serves every release of torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>

#include <omp.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// --- vectors ---------------------------------------------------------------------------------------------------------
// The compiler's own vector types: arithmetic and comparisons work lane by lane on every processor.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  static constexpr int32_t mantissa_bits = 23, bias = 127, half_bits = 0x3f000000, mantissa = 0x007fffff;
  // x * log2(e) + magic has the nearest integer in its lowest bits.
  static constexpr float magic = 12582912.0F;
  static constexpr float ln2_high = 0.693359375F, ln2_low = -2.12194440e-4F;
  static constexpr float least_exponent = -87.0F;  // exp of less counts as 0, as denormal numbers do
  static constexpr int log_terms = 5;
  // exp(r) for |r| <= ln(2) / 2 within 4e-9; the first two make exp(0) = 1.
  static constexpr float exp_terms[] = {1.0F, 1.0F, 0.49999994F, 0.16666521F, 0.041668389F, 0.008368724F, 0.0013814583F};
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
  static constexpr int64_t mantissa_bits = 52, bias = 1023, half_bits = 0x3fe0000000000000,
                           mantissa = 0x000fffffffffffff;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double least_exponent = -708.0;
  static constexpr int log_terms = 11;
  static constexpr double exp_terms[] = {1., 1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320,
                                         1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

template <typename T>
using V = typename Lanes<T>::V;
template <typename T>
using I = typename Lanes<T>::I;
template <typename T>
constexpr int kLanes = kBytes / sizeof(T);

template <typename T>
inline V<T> fill(T value) {
  return V<T>{} + value;
}

template <typename T>
inline V<T> load(const T* from) {
  V<T> found;
  std::memcpy(&found, from, kBytes);
  return found;
}

template <typename T>
inline void store(T* to, V<T> values) {
  std::memcpy(to, &values, kBytes);
}

// a * b + c with one rounding where the processor can. Everything else is compiled without such contractions, so that
// differences of equal numbers are 0.
inline V<float> fused(V<float> a, V<float> b, V<float> c) {
#if defined(__AVX512F__)
  return (V<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (V<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline V<double> fused(V<double> a, V<double> b, V<double> c) {
#if defined(__AVX512F__)
  return (V<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (V<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// All bits set in the first `count` lanes.
template <typename T>
inline I<T> first_lanes(int64_t count) {
  I<T> lane;
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = k;
  return (I<T>)(lane < I<T>{} + static_cast<decltype(Lanes<T>::bias)>(count));
}

// The lanes of a vector in one number, by halves.
template <typename T, typename Combine>
inline T folded(V<T> values, Combine combine) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &values, kBytes);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] = combine(lanes[lane], lanes[lane + half]);
  }
  return lanes[0];
}
template <typename T>
inline T total(V<T> values) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps((__m512)values);
  if constexpr (std::is_same_v<T, double>) return _mm512_reduce_add_pd((__m512d)values);
#endif
  return folded<T>(values, [](T one, T other) { return one + other; });
}
template <typename T>
inline T highest(V<T> values) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_max_ps((__m512)values);
  if constexpr (std::is_same_v<T, double>) return _mm512_reduce_max_pd((__m512d)values);
#endif
  return folded<T>(values, [](T one, T other) { return other > one ? other : one; });
}

// The first `count` lanes of a vector from and to memory; when read, the others are 0. Where the processor has masks a
// copy of a few bytes would be slower than the rest of a short row.
#if defined(__AVX512F__)
template <typename T>
inline V<T> load_some(const T* from, int64_t count) {
  const unsigned mask = (1U << count) - 1;
  if constexpr (std::is_same_v<T, float>) return (V<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  if constexpr (std::is_same_v<T, double>) return (V<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
}
template <typename T>
inline void store_some(T* to, V<T> values, int64_t count) {
  const unsigned mask = (1U << count) - 1;
  if constexpr (std::is_same_v<T, float>) _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)values);
  if constexpr (std::is_same_v<T, double>) _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)values);
}
#elif defined(__AVX2__)
template <typename T>
inline V<T> load_some(const T* from, int64_t count) {
  const __m256i mask = (__m256i)first_lanes<T>(count);
  if constexpr (std::is_same_v<T, float>) return (V<T>)_mm256_maskload_ps(from, mask);
  if constexpr (std::is_same_v<T, double>) return (V<T>)_mm256_maskload_pd(from, mask);
}
template <typename T>
inline void store_some(T* to, V<T> values, int64_t count) {
  const __m256i mask = (__m256i)first_lanes<T>(count);
  if constexpr (std::is_same_v<T, float>) _mm256_maskstore_ps(to, mask, (__m256)values);
  if constexpr (std::is_same_v<T, double>) _mm256_maskstore_pd(to, mask, (__m256d)values);
}
#else
template <typename T>
inline V<T> load_some(const T* from, int64_t count) {
  V<T> found{};
  std::memcpy(&found, from, count * sizeof(T));
  return found;
}
template <typename T>
inline void store_some(T* to, V<T> values, int64_t count) {
  std::memcpy(to, &values, count * sizeof(T));
}
#endif

// exp(x) for x <= 0 or NaN: 2^n exp(r) with |r| <= ln(2) / 2, exp(r) by a polynomial.
template <typename T>
inline V<T> exponential(V<T> x) {
  using L = Lanes<T>;
#if !defined(__AVX512F__)
  const auto vanishes = x < L::least_exponent;
  x = vanishes ? fill<T>(L::least_exponent) : x;
#endif
  const V<T> shifted = fused(x, fill<T>(T(1.4426950408889634074)), fill<T>(L::magic));
  const V<T> n = shifted - L::magic;
  V<T> r = fused(n, fill<T>(-L::ln2_high), x);
  r = fused(n, fill<T>(-L::ln2_low), r);
  constexpr int last = std::size(L::exp_terms) - 1;
  V<T> sum = fill<T>(L::exp_terms[last]);
  for (int k = last - 1; k >= 0; --k) sum = fused(sum, r, fill<T>(L::exp_terms[k]));
#if defined(__AVX512F__)
  // Lanes that vanish, minus infinity among them, are masked out at the end; not less than: NaN stays.
  if constexpr (std::is_same_v<T, float>) {
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(L::least_exponent), _CMP_NLT_UQ);
    return (V<T>)_mm512_maskz_scalef_ps(counts, (__m512)sum, (__m512)n);
  } else {
    const __mmask8 counts = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(L::least_exponent), _CMP_NLT_UQ);
    return (V<T>)_mm512_maskz_scalef_pd(counts, (__m512d)sum, (__m512d)n);
  }
#else
  const V<T> power_of_two = (V<T>)(((I<T>)shifted + L::bias) << L::mantissa_bits);
  return vanishes ? V<T>{} : sum * power_of_two;
#endif
}

// log(x) for positive and finite x: x = 2^n m with m in [sqrt(1/2), sqrt(2)), log(m) = 2 artanh((m - 1) / (m + 1)).
template <typename T>
inline V<T> logarithm(V<T> x) {
  using L = Lanes<T>;
  // Denormal numbers first become ordinary ones.
  const auto tiny = x < std::numeric_limits<T>::min();
  x = tiny ? x * T(int64_t(1) << L::mantissa_bits) : x;
  I<T> n = (((I<T>)x) >> L::mantissa_bits) - (L::bias - 1);
  V<T> m = (V<T>)((((I<T>)x) & L::mantissa) | L::half_bits);  // in [1/2, 1)
  const auto small = m < T(0.70710678118654752440);
  m = small ? m + m : m;
  n = small ? n - 1 : n;
  n = tiny ? n - L::mantissa_bits : n;
  const V<T> f = (m - T(1)) / (m + T(1));
  const V<T> square = f * f;
  V<T> sum = fill<T>(T(1) / T(2 * L::log_terms + 1));
  for (int k = L::log_terms - 1; k >= 0; --k) sum = fused(sum, square, fill<T>(T(1) / T(2 * k + 1)));
  const V<T> exponent = __builtin_convertvector(n, V<T>);
  const V<T> low = fused(exponent, fill<T>(L::ln2_low), T(2) * f * sum);
  return fused(exponent, fill<T>(L::ln2_high), low);
}

// (prior / top) ** gamma for weights from 0 to top, which is above 0, and gamma above 0.
template <typename T>
inline V<T> power(V<T> prior, T top, T gamma) {
  const auto positive = prior > T(0);
  const V<T> exponent = gamma * logarithm<T>(positive ? prior / top : fill<T>(1));
  return positive ? exponential<T>(exponent) : V<T>{};
}

// --- rows ------------------------------------------------------------------------------------------------------------

constexpr int64_t kSettle = 64;  // vectors that are summed before a double takes over

// The sum of a row. Like torch's own sums in steps, the double keeps the error of float32 from growing with the row.
template <typename T>
struct Sum {
  V<T> lanes{};
  double whole = 0;
  inline void add(V<T> values) { lanes += values; }
  inline void add(V<T> values, V<T> factors) { lanes = fused(values, factors, lanes); }
  inline void settle() {
    whole += double(total<T>(lanes));
    lanes = V<T>{};
  }
};

// One vector of a row: a whole one, or the last one, of which only some lanes lie in the row.
template <typename T, bool whole>
struct Place {
  int64_t index, count;

  inline V<T> get(const T* row) const {  // lanes behind the row are 0
    if constexpr (whole) return load<T>(row + index);
    return load_some<T>(row + index, count);
  }
  inline void put(T* row, V<T> values) const {
    if constexpr (whole) {
      store<T>(row + index, values);
    } else {
      store_some<T>(row + index, values, count);
    }
  }
  inline V<T> kept(V<T> values, T rest = 0) const {  // lanes behind the row become `rest`
    if constexpr (whole) return values;
    return first_lanes<T>(count) ? values : fill<T>(rest);
  }
};

// Calls body(place) for each vector of a row, and settle() now and then and at the end.
template <typename T, typename Body, typename Settle>
inline void over_row(int64_t classes, Body body, Settle settle) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t whole = classes / lanes * lanes;
  int64_t index = 0;
  while (true) {
    const int64_t stop = std::min(whole, index + kSettle * lanes);
    for (; index < stop; index += lanes) body(Place<T, true>{index, lanes});
    if (index == whole) break;
    settle();
  }
  if (whole < classes) body(Place<T, false>{whole, classes - whole});
  settle();
}

template <typename T>
inline T largest(const T* row, int64_t classes) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  V<T> top = fill<T>(none);
  over_row<T>(
      classes,
      [&](auto place) {
        const V<T> x = place.kept(place.get(row), none);
        top = x > top ? x : top;
      },
      [] {});
  return highest<T>(top);
}

// Of two rows in one pass.
// 1 in place of 0: what is divided by it is 0 as well.
template <typename T>
inline T not_zero(T value) {
  return value == T(0) ? T(1) : value;
}

template <typename T>
inline void largest(const T* one, const T* other, int64_t classes, T* top_of_one, T* top_of_other) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  V<T> tops[] = {fill<T>(none), fill<T>(none)};
  over_row<T>(
      classes,
      [&](auto place) {
        const V<T> x = place.kept(place.get(one), none), y = place.kept(place.get(other), none);
        tops[0] = x > tops[0] ? x : tops[0];
        tops[1] = y > tops[1] ? y : tops[1];
      },
      [] {});
  *top_of_one = highest<T>(tops[0]);
  *top_of_other = highest<T>(tops[1]);
}

// --- what comes from Python ------------------------------------------------------------------------------------------

enum Type : int64_t { kNone, kDouble, kFloat, kHalf, kBFloat16 };

// A (N, C) tensor, strides in elements.
struct Array {
  int64_t data, row_stride, class_stride, type;
};

// One call: native.py packs it, in this order, 8 bytes each. Addresses are 0 for what is not there.
struct Call {
  int64_t rows, classes, threads;
  Array student, teacher, class_prior;
  double alpha, beta, temperature, weight_temperature, gamma, mse_temperature;
  int64_t student_in_mse, divide_by_pairs, reduction;
  int64_t loss, mse, cross_entropy, student_gradient, teacher_gradient;
};
enum Reduction : int64_t { kBatchMean, kSum, kEach };

struct Half {
  uint16_t bits;
  operator float() const {
    // A float with the exponent's bias of a half; infinity and NaN have all bits of the exponent in either.
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    float found;
    std::memcpy(&found, &magnitude, sizeof(found));
    found *= 5.192296858534828e33F;  // 2^112
    uint32_t whole;
    std::memcpy(&whole, &found, sizeof(whole));
    whole |= uint32_t(bits & 0x8000) << 16 | ((bits & 0x7c00) == 0x7c00 ? 0x7f800000U : 0U);
    std::memcpy(&found, &whole, sizeof(found));
    return found;
  }
};
struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t whole = uint32_t(bits) << 16;
    float found;
    std::memcpy(&found, &whole, sizeof(found));
    return found;
  }
};

// Rows of an array. Those that lie as they are needed are read in place, others are brought to scratch one by one:
// nothing of the tensor's size is made.
template <typename T>
class Operand {
 public:
  Operand() = default;
  Operand(const Array& array, int64_t classes)
      : array_(array),
        classes_(classes),
        direct_(array.type == (std::is_same_v<T, double> ? kDouble : kFloat) && (array.class_stride == 1 || classes == 1)) {}

  const T* row(int64_t index, T* scratch) const {
    if (direct_) return from<T>(index);
    switch (array_.type) {
      case kDouble:
        return copied<double>(index, scratch);
      case kFloat:
        return copied<float>(index, scratch);
      case kHalf:
        return copied<Half>(index, scratch);
      default:
        return copied<BFloat16>(index, scratch);
    }
  }

 private:
  template <typename From>
  const From* from(int64_t index) const {
    return reinterpret_cast<const From*>(array_.data) + index * array_.row_stride;
  }
  template <typename From>
  const T* copied(int64_t index, T* scratch) const {
    const From* row = from<From>(index);
    if (array_.class_stride == 1) {
      for (int64_t i = 0; i < classes_; ++i) scratch[i] = static_cast<T>(row[i]);
    } else {
      for (int64_t i = 0; i < classes_; ++i) scratch[i] = static_cast<T>(row[i * array_.class_stride]);
    }
    return scratch;
  }

  Array array_{};
  int64_t classes_ = 0;
  bool direct_ = false;
};

// Where the weights of the weighted MSE come from.
enum class Weights {
  absent,   // beta = 0
  labels,   // the soft labels themselves
  uniform,  // gamma = 0
  softmax,  // of the teacher, with a temperature of its own
  prior,    // as it is
  power     // of the prior
};

template <typename T>
struct Problem {
  Operand<T> student, teacher, prior;
  Call settings;
  int64_t classes;
  double scale;                              // by the reduction, of each row's gradients
  T *student_gradient, *teacher_gradient;    // null where nobody wants them
  T* weights_buffer;                         // GKL: room for the weights of all rows, in one of the gradients; or null
  double* log_mass;                          // GKL: the logarithm of the mass of each row
  double top;                                // GKL: the largest of them
  double share;                              // GKL: number of rows / sum of the squared masses over the largest one
  double *mse, *cross_entropy;               // values of each row
};

// Rows of scratch end on a whole vector.
constexpr int kScratchRows = 5;
template <typename T>
constexpr int64_t pitch_of(int64_t classes) {
  return (classes + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// GKL's pass before the others: the logarithm of the mass of a row, which is the sum of its weights to the power gamma.
// Leaves the weights over the largest one in the weights_buffer if there is one.
template <typename T, Weights kind>
double weigh(const Problem<T>& problem, int64_t index, T* scratch) {
  const Call& s = problem.settings;
  const int64_t classes = problem.classes;
  T* weights_buffer = problem.weights_buffer == nullptr ? scratch : problem.weights_buffer + index * classes;
  T* room = scratch + pitch_of<T>(classes);
  Sum<T> mass, plain_mass;
  if constexpr (kind == Weights::softmax) {
    // A softmax to the power gamma is, but for its mass, the softmax of gamma t / T2.
    const T* teacher = problem.teacher.row(index, room);
    const T top = largest<T>(teacher, classes);
    const T plain = T(1 / s.weight_temperature), flat = T(s.gamma / s.weight_temperature);
    over_row<T>(
        classes,
        [&](auto place) {
          const V<T> x = place.get(teacher) - top;
          const V<T> weight = place.kept(exponential<T>(x * flat));
          mass.add(weight);
          plain_mass.add(place.kept(exponential<T>(x * plain)));
          place.put(weights_buffer, weight);
        },
        [&] { mass.settle(), plain_mass.settle(); });
    return std::log(mass.whole) - s.gamma * std::log(plain_mass.whole);
  } else if constexpr (kind == Weights::prior || kind == Weights::power) {
    const T* prior = problem.prior.row(index, room);
    const T top = kind == Weights::power ? not_zero(largest<T>(prior, classes)) : T(1);
    over_row<T>(
        classes,
        [&](auto place) {
          V<T> weight = place.get(prior);
          if constexpr (kind == Weights::power) weight = power<T>(weight, top, T(s.gamma));
          mass.add(weight);
          place.put(weights_buffer, weight);
        },
        [&] { mass.settle(); });
    return std::log(mass.whole) + s.gamma * std::log(double(top));
  }
  return std::log(double(classes));  // of weights 1
}

// Values and gradients of a row.
template <typename T, Weights kind, bool entropy>
void evaluate(const Problem<T>& problem, int64_t index, T* scratch) {
  constexpr bool mse = kind != Weights::absent;
  constexpr bool soft_labels = entropy || kind == Weights::labels;
  const Call& s = problem.settings;
  const int64_t classes = problem.classes, pitch = pitch_of<T>(classes);
  const T* student = problem.student.row(index, scratch);
  const T* teacher = problem.teacher.row(index, scratch + pitch);
  T* student_out = problem.student_gradient ? problem.student_gradient + index * classes : nullptr;
  T* teacher_out = problem.teacher_gradient ? problem.teacher_gradient + index * classes : nullptr;
  const bool buffered = problem.weights_buffer != nullptr && kind != Weights::uniform;

  T* labels = scratch + 2 * pitch;
  T* predictions = scratch + 3 * pitch;
  T* weights = kind == Weights::labels ? labels : scratch + 4 * pitch;
  const T* weights_buffer = buffered ? problem.weights_buffer + index * classes : nullptr;
  const T* prior = nullptr;
  if ((kind == Weights::prior || kind == Weights::power) && !buffered) prior = problem.prior.row(index, weights);
  const T prior_top = kind == Weights::power && !buffered ? not_zero(largest<T>(prior, classes)) : T(1);

  // Exponentials, and the sums that the rest needs.
  T teacher_top = 0, student_top = 0;
  if constexpr (entropy) {
    largest<T>(student, teacher, classes, &student_top, &teacher_top);
  } else if (soft_labels || (kind == Weights::softmax && !buffered)) {
    teacher_top = largest<T>(teacher, classes);
  }
  const T cold = T(1 / s.temperature), flat = T(s.gamma / s.weight_temperature);
  Sum<T> label_sum, prediction_sum, product_sum, weight_sum, difference_sum;
  over_row<T>(
      classes,
      [&](auto place) {
        const V<T> t = place.get(teacher), u = place.get(student);
        V<T> label{};
        if constexpr (soft_labels) {
          label = place.kept(exponential<T>((t - teacher_top) * cold));
          label_sum.add(label);
          store<T>(labels + place.index, label);
        }
        if constexpr (entropy) {
          const V<T> x = (u - student_top) * cold;
          const V<T> prediction = place.kept(exponential<T>(x));
          prediction_sum.add(prediction);
          product_sum.add(label, x);
          store<T>(predictions + place.index, prediction);
        }
        if constexpr (mse) {
          V<T> weight;
          if constexpr (kind == Weights::labels) {
            weight = label;
          } else if constexpr (kind == Weights::uniform) {
            weight = place.kept(fill<T>(1));
          } else {
            if (buffered) {
              weight = place.get(weights_buffer);
            } else {
              if constexpr (kind == Weights::softmax) weight = place.kept(exponential<T>((t - teacher_top) * flat));
              if constexpr (kind == Weights::prior) weight = place.get(prior);
              if constexpr (kind == Weights::power) weight = power<T>(place.get(prior), prior_top, T(s.gamma));
            }
            store<T>(weights + place.index, weight);
          }
          if constexpr (kind != Weights::labels) weight_sum.add(weight);
          difference_sum.add(weight, t - u);
        }
      },
      [&] {
        if constexpr (soft_labels) label_sum.settle();
        if constexpr (entropy) prediction_sum.settle(), product_sum.settle();
        if constexpr (mse) difference_sum.settle();
        if constexpr (mse && kind != Weights::labels) weight_sum.settle();
      });
  if constexpr (kind == Weights::labels) weight_sum = label_sum;

  if constexpr (entropy) {
    // -sum p log q, where log q = x - log(sum exp x): all terms are at least 0.
    problem.cross_entropy[index] = s.alpha * (std::log(prediction_sum.whole) - product_sum.whole / label_sum.whole);
  }

  // The weighted MSE of weights that sum to 1, times the square of what they do sum to.
  const double mass = weight_sum.whole;
  if constexpr (kind == Weights::prior) {
    // 1 over a denormal number is infinite, and products with one lose their digits: such weights are made larger first.
    if (mass > 0 && mass < std::numeric_limits<T>::min()) {
      const T lift = T(int64_t(1) << Lanes<T>::mantissa_bits);
      weight_sum = {}, difference_sum = {};
      over_row<T>(
          classes,
          [&](auto place) {
            const V<T> weight = load<T>(weights + place.index) * lift;
            weight_sum.add(weight);
            difference_sum.add(weight * (place.get(teacher) - place.get(student)));
            store<T>(weights + place.index, weight);
          },
          [&] { weight_sum.settle(), difference_sum.settle(); });
    }
  }
  const double weight_mass = weight_sum.whole > 0 ? weight_sum.whole : 1;
  double factor = 1;
  if (s.divide_by_pairs) {
    factor = std::exp(2 * (problem.log_mass[index] - problem.top)) * problem.share;
  } else if (kind == Weights::prior || kind == Weights::power) {
    factor = mass * mass * std::pow(double(prior_top), 2 * s.gamma);
  }
  factor *= s.beta / (s.mse_temperature * s.mse_temperature);
  const T mean = T(difference_sum.whole / weight_mass);
  const T mse_scale = T(problem.scale * factor / weight_mass), ce_scale = T(problem.scale * s.alpha / s.temperature);
  const T label_scale = T(ce_scale / label_sum.whole), prediction_scale = T(ce_scale / prediction_sum.whole);
  const bool mse_on_student = mse && s.student_in_mse;
  Sum<T> square_sum;
  over_row<T>(
      classes,
      [&](auto place) {
        V<T> ce_gradient{}, mse_gradient{};
        if constexpr (mse) {
          V<T> weight;
          if constexpr (kind == Weights::uniform) {
            weight = place.kept(fill<T>(1));
          } else {
            weight = load<T>(weights + place.index);
          }
          const V<T> centred = (place.get(teacher) - place.get(student)) - mean;
          mse_gradient = weight * centred;
          square_sum.add(mse_gradient, centred);
          mse_gradient *= mse_scale;
        }
        if (student_out) {
          if constexpr (entropy) {
            ce_gradient = load<T>(predictions + place.index) * prediction_scale - load<T>(labels + place.index) * label_scale;
          }
          place.put(student_out, mse_on_student ? ce_gradient - mse_gradient : ce_gradient);
        }
        if (teacher_out) place.put(teacher_out, mse_gradient);
      },
      [&] {
        if constexpr (mse) square_sum.settle();
      });
  if constexpr (mse) problem.mse[index] = 0.5 * factor * square_sum.whole / weight_mass;
}

// --- batches ---------------------------------------------------------------------------------------------------------

template <typename T>
using RowFunction = void (*)(const Problem<T>&, int64_t, T*);
template <typename T>
using MassFunction = double (*)(const Problem<T>&, int64_t, T*);

template <typename T, Weights kind>
std::tuple<RowFunction<T>, MassFunction<T>> functions(bool entropy) {
  return {entropy ? evaluate<T, kind, true> : evaluate<T, kind, false>, weigh<T, kind>};
}

template <typename T>
std::tuple<RowFunction<T>, MassFunction<T>> functions(Weights kind, bool entropy) {
  switch (kind) {
    case Weights::labels:
      return functions<T, Weights::labels>(entropy);
    case Weights::uniform:
      return functions<T, Weights::uniform>(entropy);
    case Weights::softmax:
      return functions<T, Weights::softmax>(entropy);
    case Weights::prior:
      return functions<T, Weights::prior>(entropy);
    case Weights::power:
      return functions<T, Weights::power>(entropy);
    default:
      return functions<T, Weights::absent>(entropy);
  }
}

Weights weights_of(const Call& s) {
  if (s.beta == 0) return Weights::absent;
  if (s.gamma == 0) return Weights::uniform;
  if (s.class_prior.data != 0) return s.gamma == 1 ? Weights::prior : Weights::power;
  return s.gamma == 1 && s.weight_temperature == s.temperature ? Weights::labels : Weights::softmax;
}

template <typename T>
void run(const Call& call) {
  const int64_t rows = call.rows, classes = call.classes;
  Problem<T> problem;
  problem.student = Operand<T>(call.student, classes);
  problem.teacher = Operand<T>(call.teacher, classes);
  problem.prior = Operand<T>(call.class_prior, classes);
  problem.settings = call;
  problem.classes = classes;
  problem.scale = call.reduction == kBatchMean && rows > 0 ? 1.0 / double(rows) : 1.0;
  problem.student_gradient = reinterpret_cast<T*>(call.student_gradient);
  problem.teacher_gradient = reinterpret_cast<T*>(call.teacher_gradient);
  const std::unique_ptr<double[]> values(new double[3 * rows + 1]());
  problem.mse = values.get();
  problem.cross_entropy = values.get() + rows;
  problem.log_mass = values.get() + 2 * rows;
  problem.top = 0;
  problem.share = 1;
  problem.weights_buffer = nullptr;

  const int64_t rows_of_a_thread = std::max<int64_t>(1, 8192 / classes);
  const int threads = int(std::min(std::max<int64_t>(call.threads, 1), (rows + rows_of_a_thread - 1) / rows_of_a_thread));
  const int64_t room = kScratchRows * pitch_of<T>(classes);
  const std::unique_ptr<T[]> scratch(new T[std::max(threads, 1) * room]);
  const auto [evaluate_row, mass_of_row] = functions<T>(weights_of(call), call.alpha > 0);
  const auto all_rows = [&](auto body) {
    if (threads <= 1) {
      for (int64_t index = 0; index < rows; ++index) body(index, scratch.get());
      return;
    }
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
      for (int64_t index = rows * thread / all; index < rows * (thread + 1) / all; ++index) {
        body(index, scratch.get() + thread * room);
      }
    }
  };
  if (call.divide_by_pairs && call.beta > 0) {
    problem.weights_buffer = problem.student_gradient ? problem.student_gradient : problem.teacher_gradient;
    all_rows([&](int64_t index, T* own) { problem.log_mass[index] = mass_of_row(problem, index, own); });
    const double top = rows > 0 ? *std::max_element(problem.log_mass, problem.log_mass + rows) : 0;
    problem.top = std::isfinite(top) ? top : 0;  // of weights that are all 0 the logarithm is not
    double pairs = 0;
    for (int64_t index = 0; index < rows; ++index) pairs += std::exp(2 * (problem.log_mass[index] - problem.top));
    problem.share = double(rows) / (pairs == 0 ? 1 : pairs);
  }
  all_rows([&](int64_t index, T* own) { evaluate_row(problem, index, own); });

  const auto reduced = [&](int64_t address, auto value) {
    T* to = reinterpret_cast<T*>(address);
    if (to == nullptr) return;
    double sum = 0;
    for (int64_t index = 0; index < rows; ++index) {
      if (call.reduction == kEach) {
        to[index] = T(value(index));
      } else {
        sum += value(index);
      }
    }
    if (call.reduction != kEach) *to = T(sum * problem.scale);
  };
  const double *mse = problem.mse, *cross_entropy = problem.cross_entropy;
  reduced(call.loss, [&](int64_t index) { return mse[index] + cross_entropy[index]; });
  reduced(call.mse, [&](int64_t index) { return mse[index]; });
  reduced(call.cross_entropy, [&](int64_t index) { return cross_entropy[index]; });
}

}  // namespace

// Computes in double where either logits are double, else in float; results are of that type. The caller has checked
// what it hands over. Returns 0, or 1 without memory.
extern "C" int decoupled_kl(const Call* call) {
  try {
    call->student.type == kDouble || call->teacher.type == kDouble ? run<double>(*call) : run<float>(*call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

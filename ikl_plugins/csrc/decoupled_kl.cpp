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

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/string_view.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

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
  static constexpr int exp_terms = 7, log_terms = 5;
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
  static constexpr int exp_terms = 13, log_terms = 11;
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

template <typename T>
constexpr auto inverse_factorials() {
  std::array<T, Lanes<T>::exp_terms + 1> found{};
  double factorial = 1;
  for (int k = 0; k <= Lanes<T>::exp_terms; ++k) {
    if (k > 0) factorial *= k;
    found[k] = T(1 / factorial);
  }
  return found;
}

// exp(x) for x <= 0 or NaN: 2^n exp(r) with |r| <= ln(2) / 2, exp(r) by its series.
template <typename T>
inline V<T> exponential(V<T> x) {
  using L = Lanes<T>;
  constexpr auto coefficients = inverse_factorials<T>();
  const auto vanishes = x < L::least_exponent;
  x = vanishes ? fill<T>(L::least_exponent) : x;
  const V<T> shifted = fused(x, fill<T>(T(1.4426950408889634074)), fill<T>(L::magic));
  const V<T> n = shifted - L::magic;
  V<T> r = fused(n, fill<T>(-L::ln2_high), x);
  r = fused(n, fill<T>(-L::ln2_low), r);
  V<T> sum = fill<T>(coefficients[L::exp_terms]);
  for (int k = L::exp_terms - 1; k >= 0; --k) sum = fused(sum, r, fill<T>(coefficients[k]));
  const V<T> power_of_two = (V<T>)(((I<T>)shifted + L::bias) << L::mantissa_bits);
  return vanishes ? V<T>{} : sum * power_of_two;
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

// prior ** gamma for weights of at least 0 and gamma above 0.
template <typename T>
inline V<T> power(V<T> prior, T gamma) {
  const auto positive = prior > T(0);
  const V<T> exponent = gamma * logarithm<T>(positive ? prior : fill<T>(1));
  // exponential() is for exponents up to 0. A weight above 1 is 1 / (1 / weight).
  const auto above = exponent > T(0);
  const V<T> found = exponential<T>(above ? -exponent : exponent);
  return positive ? (above ? T(1) / found : found) : V<T>{};
}

// --- rows ------------------------------------------------------------------------------------------------------------

constexpr int64_t kSettle = 64;  // vectors that are summed before a double takes over

// The sum of a row. Like torch's own sums in steps, the double keeps the error of float32 from growing with the row.
template <typename T>
struct Sum {
  V<T> lanes{};
  double whole = 0;
  inline void add(V<T> values) { lanes += values; }
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

// A (N, C) tensor of any floating dtype and any strides. Rows that lie as they are needed are read in place, others are
// brought to scratch one by one: nothing of the tensor's size is made.
template <typename T>
struct Operand {
  const char* data = nullptr;
  int64_t row_stride = 0, class_stride = 0, classes = 0;
  c10::ScalarType type = c10::ScalarType::Undefined;
  bool direct = false;

  Operand() = default;
  explicit Operand(const at::Tensor& tensor)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        row_stride(tensor.stride(0)),
        class_stride(tensor.stride(1)),
        classes(tensor.size(1)),
        type(tensor.scalar_type()),
        direct(type == c10::CppTypeToScalarType<T>::value && (class_stride == 1 || classes == 1)) {}

  const T* row(int64_t index, T* scratch) const {
    if (direct) return reinterpret_cast<const T*>(data) + index * row_stride;
    switch (type) {
      case c10::ScalarType::Float:
        return copied<float>(index, scratch);
      case c10::ScalarType::Double:
        return copied<double>(index, scratch);
      case c10::ScalarType::Half:
        return copied<c10::Half>(index, scratch);
      default:
        return copied<c10::BFloat16>(index, scratch);
    }
  }

 private:
  template <typename From>
  const T* copied(int64_t index, T* scratch) const {
    const From* from = reinterpret_cast<const From*>(data) + index * row_stride;
    if (class_stride == 1) {
      for (int64_t i = 0; i < classes; ++i) scratch[i] = static_cast<T>(from[i]);
    } else {
      for (int64_t i = 0; i < classes; ++i) scratch[i] = static_cast<T>(from[i * class_stride]);
    }
    return scratch;
  }
};

struct Settings {
  double alpha, beta, temperature, weight_temperature, gamma, mse_temperature;
  bool student_in_mse, divide_by_pairs;
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
  Settings settings;
  int64_t classes;
  double scale;                              // by the reduction, of each row's gradients
  T *student_gradient, *teacher_gradient;    // null where nobody wants them
  T* weights_buffer;                         // GKL: room for the weights of all rows, in one of the gradients; or null
  double* mass;                              // GKL: the mass of each row
  double share;                              // GKL: number of rows / sum of the squared masses
  double *mse, *cross_entropy;               // values of each row
};

// Rows of scratch end on a whole vector.
constexpr int kScratchRows = 5;
template <typename T>
constexpr int64_t pitch_of(int64_t classes) {
  return (classes + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// GKL's pass before the others: the mass of a row, the sum of its weights to the power gamma. Leaves the weights in the
// weights_buffer if there is one.
template <typename T, Weights kind>
double weigh(const Problem<T>& problem, int64_t index, T* scratch) {
  const Settings& s = problem.settings;
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
    return mass.whole / std::pow(plain_mass.whole, s.gamma);
  } else if constexpr (kind == Weights::prior || kind == Weights::power) {
    const T* prior = problem.prior.row(index, room);
    over_row<T>(
        classes,
        [&](auto place) {
          V<T> weight = place.get(prior);
          if constexpr (kind == Weights::power) weight = power<T>(weight, T(s.gamma));
          mass.add(weight);
          place.put(weights_buffer, weight);
        },
        [&] { mass.settle(); });
    return mass.whole;
  }
  return double(classes);  // of weights 1
}

// Values and gradients of a row.
template <typename T, Weights kind, bool entropy>
void evaluate(const Problem<T>& problem, int64_t index, T* scratch) {
  constexpr bool mse = kind != Weights::absent;
  constexpr bool soft_labels = entropy || kind == Weights::labels;
  const Settings& s = problem.settings;
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

  // Exponentials, and the sums that the rest needs.
  const T teacher_top = soft_labels || (kind == Weights::softmax && !buffered) ? largest<T>(teacher, classes) : T(0);
  const T student_top = entropy ? largest<T>(student, classes) : T(0);
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
          product_sum.add(label * x);
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
              if constexpr (kind == Weights::power) weight = power<T>(place.get(prior), T(s.gamma));
            }
            store<T>(weights + place.index, weight);
          }
          weight_sum.add(weight);
          difference_sum.add(weight * (t - u));
        }
      },
      [&] {
        if constexpr (soft_labels) label_sum.settle();
        if constexpr (entropy) prediction_sum.settle(), product_sum.settle();
        if constexpr (mse) weight_sum.settle(), difference_sum.settle();
      });

  if constexpr (entropy) {
    // -sum p log q, where log q = x - log(sum exp x): all terms are at least 0.
    problem.cross_entropy[index] = s.alpha * (std::log(prediction_sum.whole) - product_sum.whole / label_sum.whole);
  }

  // The weighted MSE of weights that sum to 1, times the square of what they do sum to.
  const double mass = weight_sum.whole;
  if constexpr (kind == Weights::prior || kind == Weights::power) {
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
    factor = problem.mass[index] * problem.mass[index] * problem.share;
  } else if (kind == Weights::prior || kind == Weights::power) {
    factor = mass * mass;
  }
  factor *= s.beta / (s.mse_temperature * s.mse_temperature);
  const T mean = T(difference_sum.whole / weight_mass), per_mass = T(1 / weight_mass);
  const T force_scale = T(problem.scale * factor), pull_scale = T(problem.scale * s.alpha / s.temperature);
  const T per_label = T(1 / label_sum.whole), per_prediction = T(1 / prediction_sum.whole);
  const bool force_on_student = mse && s.student_in_mse;
  Sum<T> square_sum;
  over_row<T>(
      classes,
      [&](auto place) {
        V<T> pull{}, force{};
        if constexpr (mse) {
          V<T> weight;
          if constexpr (kind == Weights::uniform) {
            weight = place.kept(fill<T>(1));
          } else {
            weight = load<T>(weights + place.index);
          }
          const V<T> centred = (place.get(teacher) - place.get(student)) - mean;
          force = weight * per_mass * centred;
          square_sum.add(force * centred);
          force *= force_scale;
        }
        if (student_out) {
          if constexpr (entropy) {
            pull = (load<T>(predictions + place.index) * per_prediction - load<T>(labels + place.index) * per_label) * pull_scale;
          }
          place.put(student_out, force_on_student ? pull - force : pull);
        }
        if (teacher_out) place.put(teacher_out, force);
      },
      [&] {
        if constexpr (mse) square_sum.settle();
      });
  if constexpr (mse) problem.mse[index] = 0.5 * factor * square_sum.whole;
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

Weights weights_of(const Settings& s, bool with_prior) {
  if (s.beta == 0) return Weights::absent;
  if (s.gamma == 0) return Weights::uniform;
  if (with_prior) return s.gamma == 1 ? Weights::prior : Weights::power;
  return s.gamma == 1 && s.weight_temperature == s.temperature ? Weights::labels : Weights::softmax;
}

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
Results walk(
    const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& class_prior,
    const Settings& settings, const std::string& reduction, bool student_needs, bool teacher_needs) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const auto options = student.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor student_gradient, teacher_gradient;
  if (student_needs) student_gradient = at::empty({rows, classes}, options);
  if (teacher_needs) teacher_gradient = at::empty({rows, classes}, options);

  Problem<T> problem;
  problem.student = Operand<T>(student);
  problem.teacher = Operand<T>(teacher);
  if (class_prior) problem.prior = Operand<T>(*class_prior);
  problem.settings = settings;
  problem.classes = classes;
  problem.scale = reduction == "batchmean" && rows > 0 ? 1.0 / double(rows) : 1.0;
  problem.student_gradient = student_needs ? student_gradient.data_ptr<T>() : nullptr;
  problem.teacher_gradient = teacher_needs ? teacher_gradient.data_ptr<T>() : nullptr;
  const std::unique_ptr<double[]> values(new double[3 * rows + 1]());
  problem.mse = values.get();
  problem.cross_entropy = values.get() + rows;
  problem.mass = values.get() + 2 * rows;
  problem.share = 1;
  problem.weights_buffer = nullptr;

  const auto [evaluate_row, mass_of_row] = functions<T>(weights_of(settings, class_prior.has_value()), settings.alpha > 0);
  const auto all_rows = [&](auto body) {
    at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / classes), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> scratch(new T[kScratchRows * pitch_of<T>(classes)]);
      for (int64_t index = begin; index < end; ++index) body(index, scratch.get());
    });
  };
  if (settings.divide_by_pairs && settings.beta > 0) {
    problem.weights_buffer = student_needs ? problem.student_gradient : problem.teacher_gradient;
    all_rows([&](int64_t index, T* scratch) { problem.mass[index] = mass_of_row(problem, index, scratch); });
    double pairs = 0;
    for (int64_t index = 0; index < rows; ++index) pairs += problem.mass[index] * problem.mass[index];
    problem.share = double(rows) / (pairs == 0 ? 1 : pairs);
  }
  all_rows([&](int64_t index, T* scratch) { evaluate_row(problem, index, scratch); });

  const bool each = reduction == "none";
  const auto reduced = [&](auto value) {
    at::Tensor result = each ? at::empty({rows}, options) : at::empty({}, options);
    T* to = result.template data_ptr<T>();
    if (each) {
      for (int64_t index = 0; index < rows; ++index) to[index] = T(value(index));
    } else {
      double sum = 0;
      for (int64_t index = 0; index < rows; ++index) sum += value(index);
      *to = T(sum * problem.scale);
    }
    return result;
  };
  const double *mse = problem.mse, *cross_entropy = problem.cross_entropy;
  return {
      reduced([&](int64_t index) { return mse[index] + cross_entropy[index]; }),
      reduced([&](int64_t index) { return mse[index]; }),
      reduced([&](int64_t index) { return cross_entropy[index]; }),
      student_gradient,
      teacher_gradient,
  };
}

// The caller has checked its arguments: (N, C) tensors of one shape on the CPU, each float64, float32, float16 or
// bfloat16, and settings in their ranges. A string is torch's own string_view: older releases register no other.
Results decoupled_kl(
    const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& class_prior, double alpha,
    double beta, double temperature, double weight_temperature, double gamma, double mse_temperature,
    bool student_in_mse, bool divide_by_pairs, c10::string_view reduction, bool student_needs, bool teacher_needs) {
  TORCH_CHECK(student.dim() == 2 && student.sizes() == teacher.sizes() && student.size(1) > 0,
              "decoupled_kl: logits must be two (N, C)");
  TORCH_CHECK(!class_prior || class_prior->sizes() == student.sizes(), "decoupled_kl: class_prior must be (N, C)");
  for (const at::Tensor& tensor : {student, teacher, class_prior.value_or(student)}) {
    const auto type = tensor.scalar_type();
    TORCH_CHECK(tensor.is_cpu() && tensor.layout() == c10::kStrided &&
                    (type == c10::ScalarType::Double || type == c10::ScalarType::Float ||
                     type == c10::ScalarType::Half || type == c10::ScalarType::BFloat16),
                "decoupled_kl: tensors must be dense, on the CPU and of a floating dtype of at least 16 bits");
  }
  const Settings settings{alpha, beta, temperature, weight_temperature, gamma, mse_temperature, student_in_mse,
                          divide_by_pairs};
  const bool wide = student.scalar_type() == c10::ScalarType::Double || teacher.scalar_type() == c10::ScalarType::Double;
  const auto function = wide ? walk<double> : walk<float>;
  return function(student, teacher, class_prior, settings, std::string(reduction), student_needs, teacher_needs);
}

TORCH_LIBRARY(ikl_plugins, library) {
  library.def(
      "decoupled_kl(Tensor student, Tensor teacher, Tensor? class_prior, float alpha, float beta, float temperature, "
      "float weight_temperature, float gamma, float mse_temperature, bool student_in_mse, bool divide_by_pairs, "
      "str reduction, bool student_needs, bool teacher_needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ikl_plugins, CPU, library) { library.impl("decoupled_kl", decoupled_kl); }

// The gradients are the caller's business: ikl_plugins/functional.py.
TORCH_LIBRARY_IMPL(ikl_plugins, Autograd, library) {
  library.impl("decoupled_kl", torch::CppFunction::makeFallthrough());
}

}  // namespace

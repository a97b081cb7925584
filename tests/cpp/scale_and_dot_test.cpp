// SPDX-License-Identifier: Apache-2.0
// Scaled rows and dot products: every variant against the documented order.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/reduce.hpp"
#include "kernels/reduce_variant.hpp"
#include "numbers.hpp"
#include "process_group/common/error.hpp"

namespace automoe::kernels {
namespace {

struct Rows {
  DType dtype;
  size_t count;
  size_t elements;
  Values grads;
  Values values;
  Values weights;
};

struct Result {
  Bytes grads;
  Bytes dots;

  bool operator==(const Result&) const = default;
};

template <class Number>
Rows makeRows(
    std::mt19937& random, DType dtype, size_t count, size_t elements) {
  using Weight = NumberOfSum<Number>;
  const size_t bytes = count * elements * Number::kBytes;
  Rows rows{
      dtype,
      count,
      elements,
      Values(bytes),
      Values(bytes),
      Values(count * Weight::kBytes)};
  if (count > 0) {
    fill<Number>(random, rows.grads);
    fill<Number>(random, rows.values);
    fill<Weight>(random, rows.weights);
  }
  return rows;
}

/// 256 bytes of lanes, halved until there is one; see kDotLanes.
template <class Sum>
Sum joinLanes(std::vector<Sum> lanes) {
  while (lanes.size() > 1) {
    const size_t half = lanes.size() / 2;
    for (size_t i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
    lanes.resize(half);
  }
  return lanes[0];
}

template <class Number>
Result expectedResult(const Rows& rows, bool scale) {
  using Sum = typename Number::Sum;
  using Weight = NumberOfSum<Number>;
  Result result{rows.grads.copy(), Bytes(rows.count * sizeof(Sum))};
  for (size_t i = 0; i < rows.count; ++i) {
    const Sum weight = Weight::read(rows.weights.data() + i * sizeof(Sum));
    std::vector<Sum> lanes(256 / sizeof(Sum));
    for (size_t h = 0; h < rows.elements; ++h) {
      const size_t at = (i * rows.elements + h) * Number::kBytes;
      const Sum grad = Number::read(rows.grads.data() + at);
      const Sum product = grad * Number::read(rows.values.data() + at);
      lanes[h % lanes.size()] += product;
      if (scale) {
        Number::write(result.grads.data() + at, weight * grad);
      }
    }
    Weight::write(result.dots.data() + i * sizeof(Sum), joinLanes(lanes));
  }
  return result;
}

/// Runs `function` on a copy of the rows, with dots, weights, or both.
template <class Function>
Result runOn(const Rows& rows, bool scale, bool dot, const Function& function) {
  Values grads = rows.grads;
  Values dots(rows.count * sumBytes(rows.dtype));
  function(
      rows.dtype,
      grads.data(),
      dot ? rows.values.data() : nullptr,
      scale ? rows.weights.data() : nullptr,
      dot ? dots.data() : nullptr,
      rows.count,
      rows.elements);
  return {grads.copy(), dots.copy()};
}

void expectResult(const Rows& rows, const Result& scaled, const Result& left) {
  for (const int what : {1, 2, 3}) {
    const bool scale = (what & 1) != 0;
    const bool dot = (what & 2) != 0;
    Result expected = scale ? scaled : left;
    if (!dot) {
      expected.dots.assign(expected.dots.size(), std::byte{0});
    }
    ASSERT_TRUE(runOn(rows, scale, dot, scaleAndDotRows) == expected) << what;
    for (const ReduceVariant* variant : supportedReduceVariants()) {
      ASSERT_TRUE(runOn(rows, scale, dot, variant->scaleAndDotRows) == expected)
          << variant->name << " " << what;
    }
  }
}

class ScaleAndDotTest : public testing::TestWithParam<DType> {};

TEST_P(ScaleAndDotTest, HasTheBitsOfTheReference) {
  std::mt19937 random(11);
  for (const size_t elements : kElements) {
    for (size_t count = 0; count < 6; ++count) {
      SCOPED_TRACE(concat(elements, " elements, ", count, " rows"));
      withNumber(GetParam(), [&](auto number) {
        using Chosen = decltype(number);
        const Rows rows = makeRows<Chosen>(random, GetParam(), count, elements);
        expectResult(
            rows,
            expectedResult<Chosen>(rows, true),
            expectedResult<Chosen>(rows, false));
      });
      ASSERT_FALSE(HasFatalFailure());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    DTypes, ScaleAndDotTest, testing::ValuesIn(kDTypes), [](const auto& info) {
      return std::string(nameOf(info.param));
    });

TEST(ScaleAndDotTest, LeavesTheRowsWithoutWeightsAndDots) {
  std::mt19937 random(5);
  const Rows rows =
      makeRows<Number<DType::kFloat32>>(random, DType::kFloat32, 2, 5);
  const Result result = runOn(rows, false, false, scaleAndDotRows);
  EXPECT_TRUE(result.grads == rows.grads.copy());
}

}  // namespace
}  // namespace automoe::kernels

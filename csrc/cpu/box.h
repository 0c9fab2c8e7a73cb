// Binds a C++ function to an op's overload: `mmfast::bind<f>(m, "op.cpu")` inside STABLE_TORCH_LIBRARY_IMPL.
//
// The boxed call never compares C++ types with the schema: `float` for a schema's float reads 0, and so does
// `int` for int. Only the types listed here are read rightly, and any other does not compile. A `Tensor?` has
// to be optional<Tensor>, which nobody can check from here: the tests call every optional with None.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace mmfast {

template <class T>
struct is_boxable : std::false_type {};
template <>
struct is_boxable<torch::stable::Tensor> : std::true_type {};
template <>
struct is_boxable<int64_t> : std::true_type {};
template <>
struct is_boxable<double> : std::true_type {};
template <>
struct is_boxable<bool> : std::true_type {};
template <>
struct is_boxable<std::string> : std::true_type {};
template <class T>
struct is_boxable<std::vector<T>> : is_boxable<T> {};
template <class T>
struct is_boxable<std::optional<T>> : is_boxable<T> {};

// Entries of one kernel, by the name it is bound to; calls.cpp keeps the list of them.
struct Calls {
  const char* name;
  std::atomic<int64_t> count;
  Calls* next;
};
void keep(Calls& calls, const char* name);

template <class F, F* f>
struct Bound;
template <class R, class... Args, R (*f)(Args...)>
struct Bound<R(Args...), f> {
  static_assert((is_boxable<std::remove_cvref_t<Args>>::value && ...),
                "take Tensor, int64_t, double, bool, std::string, or vector or optional of them");
  static inline Calls calls;
  static R enter(Args... args) {
    calls.count.fetch_add(1, std::memory_order_relaxed);
    return f(std::forward<Args>(args)...);
  }
};

template <auto* f>
void bind(torch::stable::detail::StableLibrary& m, const char* name) {
  using B = Bound<std::remove_pointer_t<decltype(f)>, f>;
  keep(B::calls, name);
  m.impl(name, TORCH_BOX(&B::enter));
}

}  // namespace mmfast

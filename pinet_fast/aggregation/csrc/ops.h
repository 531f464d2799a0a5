// Calls of ops by name, as the dispatcher knows them.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace pinet {

// Calls an op; returns the stack with its results.
template <class... Args>
torch::jit::Stack call(const c10::OperatorHandle& op, Args&&... args) {
  torch::jit::Stack stack;
  stack.reserve(sizeof...(args));
  (stack.emplace_back(std::forward<Args>(args)), ...);
  op.callBoxed(stack);
  return stack;
}

inline c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

}  // namespace pinet

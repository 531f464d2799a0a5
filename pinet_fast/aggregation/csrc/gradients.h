// What a step does for every parameter, in one call: Python asks one parameter after another.

#pragma once

#include <torch/csrc/python_headers.h>

namespace pinet {

extern PyMethodDef gradient_methods[];

}  // namespace pinet

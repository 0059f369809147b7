// The plans of inference, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet::bindings {

void define_inference(pybind11::module_& m);

}  // namespace fused_resnet::bindings

// How the per-target files hand their functions to primitives(): each fills its part of the tables.
#pragma once

#include "cpu/primitives.h"

namespace normcore::kernels {

void add_forward_primitives(Primitives<float>& f, Primitives<double>& d);
void add_backward_primitives(Primitives<float>& f, Primitives<double>& d);
void add_double_backward_outputs(Primitives<float>& f, Primitives<double>& d);
void add_double_backward_sums(Primitives<float>& f, Primitives<double>& d);
void add_sample_double_backward(Primitives<float>& f, Primitives<double>& d);
void add_sample_primitives(Primitives<float>& f, Primitives<double>& d);

}  // namespace normcore::kernels

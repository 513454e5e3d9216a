// Op observe, as methods of the Python module: they take Python's objects as they are.
#pragma once

#include <Python.h>

namespace childtune {

extern PyMethodDef observe_methods[];

// Looks up what the methods need of torch; false with a Python exception.
bool prepare_observe();

}  // namespace childtune

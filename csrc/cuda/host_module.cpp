// otkern._cuda_host: the CUDA kernels on the host executor, for tests. Problem is the class of otkern._native.
#include "bindings.h"
#include "host_executor.h"
#include "host_probes.h"

namespace host = otkern::cuda::host;

PYBIND11_MODULE(_cuda_host, module) {
    module.doc() = "The CUDA kernels of otkern, run on the CPU thread by thread. For tests.";
    pybind11::module_::import("otkern._native");
    otkern::cuda::bindings::bind(module);
    module.def(
        "set_order",
        [](bool backward, bool ahead, bool pieces, bool eager) { host::set_order({backward, ahead, pieces, eager}); },
        pybind11::arg("backward") = false, pybind11::arg("ahead") = false, pybind11::arg("pieces") = false,
        pybind11::arg("eager") = false,
        "The order in which waiting threads go on, whether copies are made in pieces of 16 bytes only, and whether "
        "they "
        "arrive at once; results must not depend on it.");
    module.def("probe", &otkern::cuda::host::probe, pybind11::arg("name"),
               "Runs a small kernel that shows one property of the executor, and returns what it wrote.");
}

// The linear system whose matrix is the plan of one item (implicit.h). Compiled once per SIMD level.
#include "implicit.h"

namespace otkern {
namespace OTKERN_LEVEL {

void implicit(ImplicitCall &call, int64_t item, Team &team) {
    (call.problem.dtype == Dtype::f64 ? implicit_item<double> : implicit_item<float>)(call, item, team);
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern

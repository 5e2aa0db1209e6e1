// How the marginals are relaxed: what one side's potential becomes of its soft minimum, its term of the dual objective,
// and the marginal that it asks for. The formulas are those of cpu/relaxation.h, one number at a time. To add a
// relaxation, give `Side` its update in both forms, its gap and its dual.
//
// With t = f - o, where the offset o is 0 but for the entropy's reference measure:
//   constraint    f = s                           dual  sum a t                        marginal  a
//   KL            t = rho / (rho + eps) (s - o)         -rho sum a (exp(-t / rho) - 1)           a exp(-t / rho)
//   inequality    f = min(s, o)                         sum a t                                  at most a
// The inequality comes with one number for both sides, the multiplier of the total mass, lam: there s is the soft
// minimum of potential plus lam.
#pragma once

#include "cost.h"

namespace otkern {
namespace cuda {

// One side of an item, at one eps.
template <class T>
class Side {
  public:
    T rho = infinity<T>();  // infinite: not relaxed by KL
    bool capped = false;    // the inequality

    OTKERN_DEVICE Side(const Problem &problem, const Item<T> &item, int which) {
        if (problem.kind == Kind::unbalanced) rho = item.relaxation(problem, which);
        capped = problem.kind == Kind::partial;
    }

    OTKERN_DEVICE void set_eps(T eps_) {
        eps = eps_;
        inverse_eps = 1 / eps;
        slope = is_constraint() ? T(1) : rho / (rho + eps);
        rest = is_constraint() ? T(0) : eps / (rho + eps);
        fall = is_constraint() ? T(0) : 1 / (rho + eps);
    }

    OTKERN_DEVICE bool is_penalty() const { return rho < infinity<T>(); }
    OTKERN_DEVICE bool is_constraint() const { return !is_penalty() && !capped; }
    // Whether scalings are a good form of the potentials. They know f to the rounding of eps, and a penalty asks for it
    // in units of rho. With a rho below eps a few iterations in the log domain are all it takes.
    OTKERN_DEVICE bool can_be_scaled(T at_eps) const { return !(8 * rho < at_eps); }

    // f from the soft minimum s.
    OTKERN_DEVICE T potential(T s, T o) const {
        if (capped) return minimum(s, o);
        if (is_constraint()) return s;
        // Around a slope of 1, or of 0, the form whose rounding is small beside what the slope changes.
        return rest < slope ? s - rest * (s - o) : o + slope * (s - o);
    }

    // f of a point that reaches nothing, whose soft minimum is infinite: at its cap, or else 0 by convention.
    OTKERN_DEVICE T of_dead(T o) const { return capped ? o : T(0); }

    // 1 / u for the scaling u with f = F + eps log u, from `sum` = exp((F - s) / eps). It is `sum` for a constraint.
    OTKERN_DEVICE T reciprocal(T sum, T F, T o) const {
        if (capped) return maximum(sum, cap(F, o));
        if (is_constraint()) return sum;
        const T log_sum = log_of(maximum(sum, tiny<T>()));
        const T x = (rest < slope ? log_sum - rest * log_sum : slope * log_sum) + (F - o) * fall;
        return maximum(exp_of(x), tiny<T>());
    }

    // Whether f = o by its cap.
    OTKERN_DEVICE bool at_cap(T sum, T F, T o) const { return sum <= cap(F, o); }

    // f from 1 / u; exactly o at the cap, and exactly F, which may lie above it, where nothing was scaled.
    OTKERN_DEVICE T scaled(T reciprocal, T F, T o) const {
        const T f = F - eps * log_of(reciprocal);
        return !capped || reciprocal > cap(F, o) || (reciprocal == 1 && F > o) ? f : o;
    }
    // The same from v.
    OTKERN_DEVICE T rescaled(T v, T G, T o) const {
        const T g = G + eps * log_of(v);
        return !capped || v < 1 / cap(G, o) || (v == 1 && G > o) ? g : o;
    }

    // |p - what f asks for|, in units of the weight; p is the marginal over the weight.
    OTKERN_DEVICE T gap(T p, T f, T o) const {
        const T excess = minimum(p, huge<T>()) - asked(f, o);
        return capped && !(f < o) ? maximum(excess, T(0)) : absolute(excess);
    }

    // A point's term of the dual objective: w t, or -rho w (exp(-t / rho) - 1). Nothing without weight; a point that
    // reaches nothing is let go at a price of rho where that is finite.
    OTKERN_DEVICE double dual(T weight, T potential, T offset, bool dead) const {
        const double t = double(potential) - double(offset);
        if (weight == 0) return 0;
        if (is_penalty()) return double(weight) * double(rho) * (dead ? 1 : -expm1_of(exponent(t)));
        return dead ? 0 : double(weight) * t;
    }

    // A point's mass on a side whose potentials are exact.
    OTKERN_DEVICE double mass(T weight, T potential, T offset, bool dead) const {
        if (!is_penalty()) return double(weight);
        if (weight == 0 || dead) return 0;
        return double(weight) * exp_of(exponent(double(potential) - double(offset)));
    }

  private:
    // -t / rho, cut where only iterations cut short can reach: the value of a finite problem is to be finite.
    OTKERN_DEVICE double exponent(double t) const { return minimum(-t / double(rho), sizeof(T) == 4 ? 60.0 : 600.0); }
    // The 1 / u at which f = o.
    OTKERN_DEVICE T cap(T F, T o) const { return exp_of((F - o) * inverse_eps); }
    OTKERN_DEVICE T asked(T f, T o) const { return is_penalty() ? minimum(exp_of((o - f) / rho), huge<T>()) : T(1); }

    T eps = 1, inverse_eps = 1;
    T slope = 1, rest = 0, fall = 0;  // rho / (rho + eps), eps / (rho + eps), 1 / (rho + eps)
};

// o = -eps (log w + 1/2) where there is weight, else 0.
template <class T>
OTKERN_DEVICE T entropy_offset(T weight, T eps) {
    return weight > 0 ? -eps * (log_of(maximum(weight, tiny<T>())) + T(0.5)) : T(0);
}

}  // namespace cuda
}  // namespace otkern

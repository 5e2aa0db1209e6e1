// How the marginals are relaxed: what one side's potential becomes of its soft minimum, its term of the dual objective,
// and the marginal that it asks for. To add a relaxation, give `Side` its update in both forms, its gap and its dual.
//
// With t = f - o, where the offset o is 0 but for the entropy's reference measure:
//   constraint    f = s                                   dual  sum a t                          marginal  a
//   KL            t = rho / (rho + eps) (s - o)                 -rho sum a (exp(-t / rho) - 1)             a exp(-t /
//   rho) inequality    f = min(s, o)                                 sum a t                                    at most
//   a
// The inequality comes with one number for both sides, the multiplier of the total mass, lam: there s is the soft
// minimum of potential plus lam.
#pragma once

#include "item.h"

namespace otkern {
namespace OTKERN_LEVEL {

// One side of an item, at one eps.
template <class T>
class Side {
  public:
    T rho = infinity<T>();  // infinite: not relaxed by KL
    bool capped = false;    // the inequality

    Side() {}
    Side(const Item<T> &item, int which) {
        if (item.problem.kind == Kind::unbalanced) rho = item.relaxation(which);
        capped = item.problem.kind == Kind::partial;
    }

    void set_eps(T eps_) {
        eps = eps_;
        inverse_eps = 1 / eps;
        slope = is_constraint() ? T(1) : rho / (rho + eps);
        rest = is_constraint() ? T(0) : eps / (rho + eps);
        fall = is_constraint() ? T(0) : 1 / (rho + eps);
    }

    bool is_penalty() const { return rho < infinity<T>(); }
    bool is_constraint() const { return !is_penalty() && !capped; }
    // Whether scalings are a good form of the potentials. They know f to the rounding of eps, and a penalty asks for it
    // in units of rho. With a rho below eps a few iterations in the log domain are all it takes.
    bool can_be_scaled(T at_eps) const { return !(8 * rho < at_eps); }

    // f from the soft minimum s.
    Vec<T> potential(Vec<T> s, Vec<T> o) const {
        if (capped) return vmin<T>(s, o);
        if (is_constraint()) return s;
        // Around a slope of 1, or of 0, the form whose rounding is small beside what the slope changes.
        return rest < slope ? s - rest * (s - o) : o + slope * (s - o);
    }

    // f of a point that reaches nothing, whose soft minimum is infinite: at its cap, or else 0 by convention.
    Vec<T> of_dead(Vec<T> o) const { return capped ? o : Vec<T>{}; }

    // 1 / u for the scaling u with f = F + eps log u, from `sum` = exp((F - s) / eps). It is `sum` for a constraint.
    Vec<T> reciprocal(Vec<T> sum, Vec<T> F, Vec<T> o) const {
        if (capped) return vmax<T>(sum, cap(F, o));
        if (is_constraint()) return sum;
        const Vec<T> log_sum = vlog<T>(vmax<T>(sum, splat(tiny<T>())));
        const Vec<T> x = (rest < slope ? log_sum - rest * log_sum : slope * log_sum) + (F - o) * fall;
        return vmax<T>(vexp<T>(x), splat(tiny<T>()));
    }

    // Whether f = o by its cap.
    Bits<T> at_cap(Vec<T> sum, Vec<T> F, Vec<T> o) const { return sum <= cap(F, o); }

    // f from 1 / u; exactly o at the cap, and exactly F, which may lie above it, where nothing was scaled.
    Vec<T> scaled(Vec<T> reciprocal, Vec<T> F, Vec<T> o) const {
        const Vec<T> f = F - eps * vlog<T>(reciprocal);
        return capped ? select<T>((reciprocal > cap(F, o)) | ((reciprocal == 1) & (F > o)), f, o) : f;
    }
    // The same from v.
    Vec<T> rescaled(Vec<T> v, Vec<T> G, Vec<T> o) const {
        const Vec<T> g = G + eps * vlog<T>(v);
        return capped ? select<T>((v < 1 / cap(G, o)) | ((v == 1) & (G > o)), g, o) : g;
    }

    // |p - what f asks for|, in units of the weight; p is the marginal over the weight.
    Vec<T> gap(Vec<T> p, Vec<T> f, Vec<T> o) const {
        const Vec<T> excess = vmin<T>(p, splat(huge<T>())) - asked(f, o), size = vmax<T>(excess, -excess);
        return capped ? select<T>(f < o, size, vmax<T>(excess, Vec<T>{})) : size;
    }

    // sum w t, or -rho sum w (exp(-t / rho) - 1), in double: a term of the value. Points without mass, and those that
    // reach nothing, which a finite rho lets go at a price of rho.
    double dual(const T *weights, const T *potential, const T *offset, const T *dead, int64_t count) const {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) {
            const double weight = weights[i], t = double(potential[i]) - double(offset[i]);
            if (weight == 0) continue;
            if (is_penalty())
                sum += weight * double(rho) * (dead[i] != 0 ? 1 : -__builtin_expm1(exponent(t)));
            else if (dead[i] == 0)
                sum += weight * t;
        }
        return sum;
    }

    // The mass of a side whose potentials are exact.
    double mass(const T *weights, const T *potential, const T *offset, const T *dead, int64_t count) const {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) {
            const double t = double(potential[i]) - double(offset[i]);
            if (!is_penalty())
                sum += weights[i];
            else if (weights[i] != 0 && dead[i] == 0)
                sum += double(weights[i]) * __builtin_exp(exponent(t));
        }
        return sum;
    }

  private:
    // -t / rho, cut where only iterations cut short can reach: the value of a finite problem is to be finite.
    double exponent(double t) const { return minimum(-t / double(rho), sizeof(T) == 4 ? 60.0 : 600.0); }
    // The 1 / u at which f = o.
    Vec<T> cap(Vec<T> F, Vec<T> o) const { return vexp<T>((F - o) * inverse_eps); }
    Vec<T> asked(Vec<T> f, Vec<T> o) const {
        if (!is_penalty()) return splat(T(1));
        return vmin<T>(vexp<T>((o - f) / rho), splat(huge<T>()));
    }

    T eps = 1, inverse_eps = 1;
    T slope = 1, rest = 0, fall = 0;  // rho / (rho + eps), eps / (rho + eps), 1 / (rho + eps)
};

// o = -eps (log w + 1/2) where there is weight, else 0.
template <class T>
OTKERN_INLINE Vec<T> entropy_offset(Vec<T> weight, T eps) {
    return select<T>(weight > 0, -eps * (vlog<T>(vmax<T>(weight, splat(tiny<T>()))) + T(0.5)), Vec<T>{});
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern

//! Elementwise arithmetic, sums, and the optimizer step.

use crate::bf16::{self, Packing};
use crate::isa::{Isa, dispatch};
use crate::tile::DotKernel;
use crate::vector::{self, fold2, map2};
use pulp::Simd;

/// `y += x`.
pub fn add_assign(isa: Isa, x: &[f32], y: &mut [f32]) {
    dispatch!(isa, s => map2(s, y, x, #[inline(always)] |y, x| s.add_f32s(y, x)))
}

/// `y *= x`.
pub fn mul_assign(isa: Isa, x: &[f32], y: &mut [f32]) {
    dispatch!(isa, s => map2(s, y, x, #[inline(always)] |y, x| s.mul_f32s(y, x)))
}

/// `y = scale * y + shift`.
pub fn affine(isa: Isa, scale: f32, shift: f32, y: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, scale: f32, shift: f32, y: &mut [f32]) {
        let (a, b) = (s.splat_f32s(scale), s.splat_f32s(shift));
        let (body, tail) = S::as_mut_simd_f32s(y);
        for y in body {
            *y = s.mul_add_e_f32s(a, *y, b);
        }
        let rest = s.mul_add_e_f32s(a, s.partial_load_f32s(tail), b);
        s.partial_store_f32s(tail, rest);
    }
    dispatch!(isa, s => run(s, scale, shift, y))
}

/// `y *= 1 + row` for every row of `y`.
pub fn scale_rows(isa: Isa, row: &[f32], y: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, row: &[f32], y: &mut [f32]) {
        for y in y.chunks_exact_mut(row.len()) {
            map2(
                s,
                y,
                row,
                #[inline(always)]
                |y, x| s.mul_add_e_f32s(y, x, y),
            );
        }
    }
    dispatch!(isa, s => run(s, row, y))
}

/// Rounds every element to bf16; both slices have the same length.
pub fn round_to_bf16(isa: Isa, from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "slices of equal length");
    dispatch!(isa, _s => bf16::round_each(from, to))
}

/// Widens every element from bf16; both slices have the same length.
pub fn widen_from_bf16(isa: Isa, from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "slices of equal length");
    dispatch!(isa, _s => bf16::widen_each(from, to))
}

/// `y = e^x`.
pub fn exp(isa: Isa, x: &[f32], y: &mut [f32]) {
    dispatch!(isa, s => map2(s, y, x, #[inline(always)] |_, x| vector::exp(s, x)))
}

/// `y += row` for every row of `y`.
pub fn add_rows(isa: Isa, row: &[f32], y: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, row: &[f32], y: &mut [f32]) {
        for y in y.chunks_exact_mut(row.len()) {
            map2(
                s,
                y,
                row,
                #[inline(always)]
                |y, x| s.add_f32s(y, x),
            );
        }
    }
    dispatch!(isa, s => run(s, row, y))
}

/// `out = sum of the rows of x`, in row order.
pub fn sum_rows(isa: Isa, x: &[f32], out: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, x: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for row in x.chunks_exact(out.len()) {
            map2(
                s,
                out,
                row,
                #[inline(always)]
                |o, x| s.add_f32s(o, x),
            );
        }
    }
    dispatch!(isa, s => run(s, x, out))
}

/// Sum of squares, accumulated in f64 over runs of 4096.
pub fn squared_norm(isa: Isa, x: &[f32]) -> f64 {
    dispatch!(isa, s => fold2(s, x, x, #[inline(always)] |x, _, total| s.mul_add_e_f32s(x, x, total)))
}

/// `out = a * x + b * y` (the forward process: `x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps`).
pub fn combine(isa: Isa, a: f32, x: &[f32], b: f32, y: &[f32], out: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, a: f32, x: &[f32], b: f32, y: &[f32], out: &mut [f32]) {
        let (a, b) = (s.splat_f32s(a), s.splat_f32s(b));
        out.copy_from_slice(x);
        map2(
            s,
            out,
            y,
            #[inline(always)]
            |x, y| s.mul_add_e_f32s(a, x, s.mul_f32s(b, y)),
        );
    }
    dispatch!(isa, s => run(s, a, x, b, y, out))
}

/// Parameters of one Adam step (Kingma and Ba 2015, algorithm 1; decoupled decay: Loshchilov and Hutter
/// 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Weight decay: decoupled (AdamW) or added to the gradient (Adam).
    pub weight_decay: f64,
    /// Whether the decay is decoupled.
    pub decoupled: bool,
    /// Step number, from 1.
    pub step: u64,
    /// Decay of the moving average of the weights; ignored without an average.
    pub ema_decay: f64,
    /// Scale of the gradient, applied first (clipping).
    pub grad_scale: f64,
}

/// One Adam step and the moving average of the weights, in one pass over memory. `ema` may be empty.
pub fn adam(
    isa: Isa,
    step: &AdamStep,
    grad: &[f32],
    weight: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    ema: &mut [f32],
) {
    assert_eq!([weight.len(), exp_avg.len(), exp_avg_sq.len()], [grad.len(); 3]);
    assert!(ema.is_empty() || ema.len() == grad.len());
    dispatch!(isa, s => adam_generic(s, step, grad, weight, exp_avg, exp_avg_sq, ema))
}

#[inline(always)]
fn adam_generic<S: Simd>(
    s: S,
    step: &AdamStep,
    grad: &[f32],
    weight: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    ema: &mut [f32],
) {
    let rule = AdamRule::new(s, step);
    let (g, g_tail) = S::as_simd_f32s(grad);
    let (w, w_tail) = S::as_mut_simd_f32s(weight);
    let (m, m_tail) = S::as_mut_simd_f32s(exp_avg);
    let (v, v_tail) = S::as_mut_simd_f32s(exp_avg_sq);
    let (e, e_tail) = S::as_mut_simd_f32s(ema);
    for i in 0..g.len() {
        (w[i], m[i], v[i]) = rule.step(s, g[i], w[i], m[i], v[i]);
    }
    for (e, w) in e.iter_mut().zip(&*w) {
        *e = rule.average(s, *e, *w);
    }
    let (g, w) = (s.partial_load_f32s(g_tail), s.partial_load_f32s(w_tail));
    let (w, m, v) = rule.step(s, g, w, s.partial_load_f32s(m_tail), s.partial_load_f32s(v_tail));
    s.partial_store_f32s(w_tail, w);
    s.partial_store_f32s(m_tail, m);
    s.partial_store_f32s(v_tail, v);
    let e = rule.average(s, s.partial_load_f32s(e_tail), w);
    s.partial_store_f32s(e_tail, e);
}

/// The constants of an Adam step, in every lane.
struct AdamRule<S: Simd> {
    rate: S::f32s,
    root: S::f32s,
    eps: S::f32s,
    share1: S::f32s,
    beta2: S::f32s,
    share2: S::f32s,
    /// Weight decay that is added to the gradient.
    decay: S::f32s,
    /// What decoupled decay leaves of the weight.
    shrink: S::f32s,
    ema_share: S::f32s,
    scale: S::f32s,
}

impl<S: Simd> AdamRule<S> {
    #[inline(always)]
    fn new(s: S, step: &AdamStep) -> Self {
        let correction1 = 1.0 - step.beta1.powf(step.step as f64);
        let correction2 = (1.0 - step.beta2.powf(step.step as f64)).sqrt();
        let (decay, shrink) =
            if step.decoupled { (0.0, 1.0 - step.lr * step.weight_decay) } else { (step.weight_decay, 1.0) };
        Self {
            rate: s.splat_f32s((-step.lr / correction1) as f32),
            root: s.splat_f32s((1.0 / correction2) as f32),
            eps: s.splat_f32s(step.eps as f32),
            share1: s.splat_f32s((1.0 - step.beta1) as f32),
            beta2: s.splat_f32s(step.beta2 as f32),
            share2: s.splat_f32s((1.0 - step.beta2) as f32),
            decay: s.splat_f32s(decay as f32),
            shrink: s.splat_f32s(shrink as f32),
            ema_share: s.splat_f32s((1.0 - step.ema_decay) as f32),
            scale: s.splat_f32s(step.grad_scale as f32),
        }
    }

    /// The new weight and moments.
    #[inline(always)]
    fn step(&self, s: S, g: S::f32s, w: S::f32s, m: S::f32s, v: S::f32s) -> (S::f32s, S::f32s, S::f32s) {
        let g = s.mul_add_e_f32s(self.decay, w, s.mul_f32s(g, self.scale));
        let w = s.mul_f32s(w, self.shrink);
        let m = s.mul_add_e_f32s(self.share1, s.sub_f32s(g, m), m);
        let v = s.mul_add_e_f32s(s.mul_f32s(g, g), self.share2, s.mul_f32s(v, self.beta2));
        let denominator = s.mul_add_e_f32s(s.sqrt_f32s(v), self.root, self.eps);
        (s.mul_add_e_f32s(self.rate, s.div_f32s(m, denominator), w), m, v)
    }

    /// The new average.
    #[inline(always)]
    fn average(&self, s: S, e: S::f32s, w: S::f32s) -> S::f32s {
        s.mul_add_e_f32s(self.ema_share, s.sub_f32s(w, e), e)
    }
}

/// Keeps the FMA units busy for `rounds` rounds, in registers only; returns the number of floating-point
/// operations. Measures the peak throughput of the machine.
pub fn fma_throughput(isa: Isa, rounds: u64) -> u64 {
    /// Enough independent accumulators to hide the latency, few enough for sixteen registers.
    const SUMS: usize = 12;
    #[inline(always)]
    fn run<S: Simd>(s: S, rounds: u64) -> u64 {
        let (a, b) = (s.splat_f32s(std::hint::black_box(0.999)), s.splat_f32s(std::hint::black_box(0.5)));
        let mut sums = [a; SUMS];
        for _ in 0..rounds {
            for i in 0..SUMS {
                sums[i] = s.mul_add_e_f32s(sums[i], a, b);
            }
        }
        std::hint::black_box(sums);
        rounds * (2 * SUMS * S::F32_LANES) as u64
    }
    dispatch!(isa, s => run(s, rounds))
}

/// Like [`fma_throughput`], for bf16 pairs if the machine has an instruction for them.
pub fn bf16_fma_throughput(isa: Isa, rounds: u64) -> Option<u64> {
    /// As for f32.
    const SUMS: usize = 12;
    #[inline(always)]
    fn run<S: Simd>(s: S, dot: impl DotKernel, rounds: u64) -> u64 {
        let a = std::hint::black_box(0.5);
        let b = s.splat_f32s(a);
        let mut sums = [[b]; SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                dot.multiply(s, a, [b], sum);
            }
        }
        std::hint::black_box(sums);
        rounds * (4 * SUMS * S::F32_LANES) as u64
    }
    isa.has_bf16().then(|| dispatch!(isa, Packing::Pairs, s, dot => run(s, dot, rounds)))
}

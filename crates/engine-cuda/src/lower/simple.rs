//! Pointwise operations, random sampling, sums, losses, resampling.

use super::{Arg, CONTROL, Lowering, MemRef, THREADS, input, int, output};
use ddpm_engine::Shape;
use ddpm_engine::ops::{
    Activation, Affine, Dropout, EmbeddingGrad, Fill, Loss, QSample, RandomNormal, RandomTimestep, Resample,
    RunningAverage, SinusoidalEmbedding, Slice, Taps, VariationalBound,
};
use ddpm_rng::Purpose;
use std::f64::consts::LN_2;

/// Elements per partial sum of a loss.
pub(crate) const PARTIAL_ELEMS: usize = 8192;

/// Purpose, drop probability as a threshold for random words, and scale of kept elements, as on the CPU.
pub(super) fn thresholds(op: &Dropout) -> [Arg<MemRef>; 3] {
    let purpose = Purpose::Dropout as u32 | op.site << 8;
    let threshold = (op.p * 4_294_967_296.0) as u32;
    [Arg::Uint(purpose), Arg::Uint(threshold), Arg::Float((1.0 / (1.0 - op.p)) as f32)]
}

/// Elements per image; the first dimension counts images.
fn image(x: Shape) -> usize {
    x.len() / x.dims()[0]
}

fn nhwc(x: Shape) -> [usize; 4] {
    x.nhwc().expect("checked when the node was added")
}

fn kind(loss: Loss) -> [Arg<MemRef>; 2] {
    let (kind, delta) = match loss {
        Loss::Mse => (0, 0.0),
        Loss::L1 => (1, 0.0),
        Loss::Huber { delta } => (2, delta),
    };
    [int(kind), Arg::Float(delta)]
}

impl Lowering<'_> {
    pub(super) fn activate(&mut self, act: Activation) {
        let n = self.outputs[0].len();
        let kernel = match act {
            Activation::Silu => "silu_forward",
            Activation::Relu => "relu_forward",
            Activation::Gelu => "gelu_forward",
            Activation::Mish => "mish_forward",
        };
        self.each(kernel, n.div_ceil(8), [input(0), output(0), int(n)]);
    }

    pub(super) fn activate_grad(&mut self, act: Activation) {
        self.pairwise(match act {
            Activation::Silu => "silu_backward",
            Activation::Relu => "relu_backward",
            Activation::Gelu => "gelu_backward",
            Activation::Mish => "mish_backward",
        });
    }

    pub(super) fn pairwise(&mut self, kernel: &'static str) {
        let n = self.outputs[0].len();
        self.each(kernel, n.div_ceil(8), [input(0), input(1), output(0), int(n)]);
    }

    pub(super) fn per_image(&mut self, kernel: &'static str) {
        let x = self.inputs[0];
        let sizes = [int(x.len()), int(image(x)), int(x.channels())];
        self.each(kernel, x.len().div_ceil(8), [input(0), input(1), output(0), sizes[0], sizes[1], sizes[2]]);
    }

    pub(super) fn affine(&mut self, op: &Affine) {
        let n = self.outputs[0].len();
        let constants = [Arg::Float(op.scale), Arg::Float(op.shift)];
        self.each("affine", n.div_ceil(8), [input(0), output(0), int(n), constants[0], constants[1]]);
    }

    pub(super) fn fill(&mut self, op: &Fill) {
        let n = self.outputs[0].len();
        self.each("fill", n, [output(0), int(n), Arg::Float(op.value)]);
    }

    pub(super) fn running_average(&mut self, op: &RunningAverage) {
        let n = self.outputs[0].len();
        let args = [input(0), input(1), output(0), int(n), Arg::Float(op.momentum)];
        self.each("running_average", n.div_ceil(8), args);
    }

    pub(super) fn concat(&mut self) {
        let (a, b) = (self.inputs[0].channels(), self.inputs[1].channels());
        let n = self.outputs[0].len();
        let sizes = [n / (a + b), a, b].map(int);
        let args = [input(0), input(1), output(0), sizes[0], sizes[1], sizes[2]];
        self.each("concat", n.div_ceil(8), args);
    }

    pub(super) fn slice(&mut self, op: &Slice) {
        let n = self.outputs[0].len();
        let sizes = [n / op.len, self.inputs[0].channels(), op.from, op.len].map(int);
        let args = [input(0), output(0), sizes[0], sizes[1], sizes[2], sizes[3]];
        self.each("slice", n.div_ceil(8), args);
    }

    pub(super) fn dropout(&mut self, op: &Dropout) {
        let (x, [purpose, threshold, scale]) = (self.inputs[0], thresholds(op));
        let counters = image(x).div_ceil(64) * 16;
        let args = [input(0), output(0), int(image(x)), CONTROL, purpose, threshold, scale];
        self.launch("dropout", [counters.div_ceil(THREADS), x.dims()[0], 1], [THREADS, 1, 1], args);
    }

    pub(super) fn random_normal(&mut self, op: &RandomNormal) {
        let (n, image) = (op.shape.dims()[0], image(op.shape));
        let args = [output(0), int(image), CONTROL, Arg::Uint(op.purpose as u32)];
        self.launch("random_normal", [image.div_ceil(4 * THREADS), n, 1], [THREADS, 1, 1], args);
    }

    pub(super) fn random_timestep(&mut self, op: &RandomTimestep) {
        let purpose = Arg::Uint(Purpose::Timestep as u32);
        self.each("random_timestep", op.n, [output(0), int(op.n), CONTROL, purpose, Arg::Uint(op.steps)]);
    }

    pub(super) fn q_sample(&mut self, op: &QSample) {
        let x = self.inputs[0];
        let (a, b) =
            (self.constants.push(&op.sqrt_alpha_bar), self.constants.push(&op.sqrt_one_minus_alpha_bar));
        let sizes = [x.len(), image(x), op.sqrt_alpha_bar.len()].map(int);
        let args = [input(0), input(1), input(2), output(0), sizes[0], sizes[1], a, b, sizes[2]];
        self.each("q_sample", x.len(), args);
    }

    pub(super) fn sinusoidal_embedding(&mut self, op: &SinusoidalEmbedding) {
        let (n, half) = (self.inputs[0].len(), op.dim / 2);
        let divisor = half as f64 - op.shift;
        let frequencies: Vec<f64> = (0..half).map(|i| libm::pow(1e4, -(i as f64) / divisor)).collect();
        let table = self.constants.push(&frequencies);
        let cosines_first = int(op.cosines_first.into());
        self.each(
            "sinusoidal_embedding",
            n * half,
            [input(0), output(0), int(n), int(half), table, cosines_first],
        );
    }

    pub(super) fn embedding(&mut self) {
        let (rows, n, c) = (self.inputs[0].dims()[0], self.inputs[1].len(), self.inputs[0].channels());
        self.each("embedding", n * c, [input(0), input(1), output(0), int(n), int(c), int(rows)]);
    }

    pub(super) fn embedding_grad(&mut self, op: &EmbeddingGrad) {
        let (n, c) = (self.inputs[1].len(), self.inputs[0].channels());
        let args = [input(0), input(1), output(0), int(n), int(c), int(op.rows)];
        self.each("embedding_grad", op.rows * c, args);
    }

    /// Taps as three tables: where each position's taps begin, input positions, weights.
    fn taps(&mut self, taps: &Taps) -> [Arg<MemRef>; 3] {
        let (mut starts, mut positions, mut weights) = (vec![0i32], Vec::new(), Vec::new());
        for o in 0..taps.outputs() {
            for &(position, weight) in taps.of(o) {
                positions.push(position as i32);
                weights.push(weight);
            }
            starts.push(positions.len() as i32);
        }
        [self.constants.push(&starts), self.constants.push(&positions), self.constants.push(&weights)]
    }

    pub(super) fn resample(&mut self, op: &Resample) {
        let ([n, h, w, c], [_, oh, ow, _]) = (nhwc(self.inputs[0]), nhwc(self.outputs[0]));
        let ([r0, r1, r2], [c0, c1, c2]) = (self.taps(&op.rows), self.taps(&op.columns));
        let [n_, h, w, oh_, ow_, c_] = [n, h, w, oh, ow, c].map(int);
        let args = [input(0), output(0), n_, h, w, oh_, ow_, c_, r0, r1, r2, c0, c1, c2];
        self.each("resample", (n * oh * ow * c).div_ceil(8), args);
    }

    pub(super) fn max_pool(&mut self) {
        let [n, h, w, c] = nhwc(self.inputs[0]).map(int);
        self.each("max_pool", self.outputs[0].len(), [input(0), output(0), n, h, w, c]);
    }

    pub(super) fn max_pool_grad(&mut self) {
        let [n, h, w, c] = nhwc(self.inputs[1]).map(int);
        let count = self.inputs[1].len().div_ceil(4);
        self.each("max_pool_grad", count, [input(0), input(1), output(0), n, h, w, c]);
    }

    pub(super) fn reduce_spatial(&mut self) {
        let [n, h, w, c] = nhwc(self.inputs[0]);
        self.column_sums(input(0), output(0), n, h * w, c);
    }

    pub(super) fn sum_rows(&mut self) {
        let c = self.inputs[0].channels();
        self.column_sums(input(0), output(0), 1, self.inputs[0].len() / c, c);
    }

    /// Timesteps, weight table and its length for a weighted loss; length 0 for an unweighted one.
    fn weights(&mut self, weights: Option<&[f32]>) -> [Arg<MemRef>; 3] {
        match weights {
            Some(w) => [input(2), self.constants.push(w), int(w.len())],
            None => [CONTROL, CONTROL, int(0)],
        }
    }

    pub(super) fn loss(&mut self, loss: Loss, weights: Option<&[f32]>) {
        let (x, count) = (self.inputs[0], self.inputs[0].len().div_ceil(PARTIAL_ELEMS));
        let ([t, table, steps], [kind, delta]) = (self.weights(weights), kind(loss));
        let (parts, counter) = (self.scratch(2 * count), self.counters(1)); // f64
        let mut args = vec![input(0), input(1), t, table, output(0), parts, counter];
        args.extend([int(x.len()), int(image(x)), steps, kind, delta, int(PARTIAL_ELEMS)]);
        self.launch_all("loss", [count, 1, 1], [THREADS, 1, 1], args);
    }

    pub(super) fn loss_grad(&mut self, loss: Loss, weights: Option<&[f32]>) {
        let x = self.inputs[0];
        let dloss = input(if weights.is_some() { 3 } else { 2 });
        let ([t, table, steps], [kind, delta]) = (self.weights(weights), kind(loss));
        let sizes = [int(x.len()), int(image(x))];
        let args = [input(0), input(1), t, table, dloss, output(0), sizes[0], sizes[1], steps, kind, delta];
        self.each("loss_grad", x.len(), args);
    }

    /// The per-timestep table of a variational bound, and the factor of its sum.
    fn bound_tables(&mut self, op: &VariationalBound) -> [Arg<MemRef>; 2] {
        let mut steps = Vec::with_capacity(6 * op.steps.len());
        for s in op.steps.iter() {
            let decoder = f64::from(u8::from(s.decoder));
            steps.extend([
                s.to_x_0.0,
                s.to_x_0.1,
                s.posterior_x_0,
                s.log_variance.0,
                s.log_variance.1,
                decoder,
            ]);
        }
        let factor = op.scale / (self.inputs[0].len() as f64 * LN_2);
        [self.constants.push(&steps), self.constants.push(&[factor])]
    }

    pub(super) fn bound(&mut self, op: &VariationalBound) {
        let (x, count) = (self.inputs[0], self.inputs[0].len().div_ceil(PARTIAL_ELEMS));
        let [steps, factor] = self.bound_tables(op);
        let (parts, counter) = (self.scratch(2 * count), self.counters(1)); // f64
        let [output_, v, x_0, x_t, t] = [0, 1, 2, 3, 4].map(input);
        let mut args = vec![output_, v, x_0, x_t, t, steps, factor, output(0), parts, counter];
        args.extend([x.len(), image(x), op.steps.len(), PARTIAL_ELEMS].map(int));
        self.launch_all("bound", [count, 1, 1], [THREADS, 1, 1], args);
    }

    pub(super) fn bound_grad(&mut self, op: &VariationalBound) {
        let x = self.inputs[0];
        let [steps, factor] = self.bound_tables(op);
        let [n, image, timesteps] = [x.len(), image(x), op.steps.len()].map(int);
        let [output_, v, x_0, x_t, t, dloss] = [0, 1, 2, 3, 4, 5].map(input);
        let args = [output_, v, x_0, x_t, t, dloss, steps, factor, output(0), n, image, timesteps];
        self.each("bound_grad", x.len(), args);
    }
}

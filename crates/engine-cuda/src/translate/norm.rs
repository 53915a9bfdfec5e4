//! Normalisations.

use super::{Arg, RUN, THREADS, Translation, input, int, output};
use ddpm_engine::ops::GroupNorm;

impl Translation<'_> {
    pub(super) fn group_norm(&mut self, op: &GroupNorm) {
        let (x, n) = (self.inputs[0], self.inputs[0].dims()[0]);
        let (c, pixels) = (x.channels(), x.len() / n / x.channels());
        let [pixels, c, groups, silu] = [pixels, c, op.groups, op.silu.into()].map(int);
        let eps = Arg::Float(op.eps);
        let args = [input(0), input(1), input(2), output(0), output(1), pixels, c, groups, eps, silu];
        self.launch("group_norm", [op.groups, n, 1], [THREADS, 1, 1], args);
    }

    /// Operands `x, dy, gamma, beta, statistics`.
    pub(super) fn group_norm_grad(&mut self, op: &GroupNorm) {
        let (x, n) = (self.inputs[0], self.inputs[0].dims()[0]);
        let (c, pixels) = (x.channels(), x.len() / n / x.channels());
        let runs = pixels.div_ceil(RUN);
        let parts = self.scratch(n * runs * 2 * c);
        let shares = self.scratch(n * 2 * c);
        let means = self.scratch(n * op.groups * 2);
        let [x_, dy, gamma, beta, stats] = [0, 1, 2, 3, 4].map(input);
        let [n_, pixels_, c_, groups, silu] = [n, pixels, c, op.groups, op.silu.into()].map(int);
        let args = [x_, dy, gamma, beta, stats, parts, pixels_, c_, groups, int(RUN), silu];
        self.launch("group_norm_grad_parts", [c.div_ceil(32), runs, n], [32, 8, 1], args);
        let args = [parts, gamma, shares, means, pixels_, c_, groups, int(runs)];
        self.launch("group_norm_grad_means", [op.groups, n, 1], [32, 1, 1], args);
        let args = [x_, dy, gamma, beta, stats, means, output(0), n_, pixels_, c_, groups, silu];
        self.each("group_norm_grad", x.len(), args);
        self.add_parts(shares, output(1), 1, n, 2 * c, c, c);
        self.add_parts(shares, output(2), 1, n, 2 * c, 0, c);
    }

    pub(super) fn layer_norm(&mut self, eps: f32) {
        let c = self.inputs[0].channels();
        let rows = self.inputs[0].len() / c;
        let args = [input(0), input(1), input(2), output(0), output(1), int(rows), int(c), Arg::Float(eps)];
        self.launch("layer_norm", [rows.div_ceil(8), 1, 1], [32, 8, 1], args);
    }

    /// Operands `dy, x, gamma, statistics`.
    pub(super) fn layer_norm_grad(&mut self) {
        let c = self.inputs[0].channels();
        let rows = self.inputs[0].len() / c;
        let runs = rows.div_ceil(RUN);
        let parts = self.scratch(runs * 2 * c);
        let [dy, x, gamma, stats] = [0, 1, 2, 3].map(input);
        let args = [dy, x, gamma, stats, output(0), int(rows), int(c)];
        self.launch("layer_norm_grad", [rows.div_ceil(8), 1, 1], [32, 8, 1], args);
        let args = [dy, x, stats, parts, int(rows), int(c), int(RUN)];
        self.launch("layer_norm_grad_parts", [c.div_ceil(32), runs, 1], [32, 8, 1], args);
        self.add_parts(parts, output(1), 1, runs, 2 * c, 0, c);
        self.add_parts(parts, output(2), 1, runs, 2 * c, c, c);
    }

    /// Results `y`, mean, `1 / sqrt(variance + eps)`, unbiased variance.
    pub(super) fn batch_norm(&mut self, eps: f32) {
        let (x, c) = (self.inputs[0], self.inputs[0].channels());
        let rows = x.len() / c;
        let runs = rows.div_ceil(RUN);
        let (parts, scale) = (self.scratch(runs * c), self.scratch(c));
        let [y, mean, rstd, unbiased] = [0, 1, 2, 3].map(output);
        let (rows_, c_, runs_) = (int(rows), int(c), int(runs));
        self.column_sums(input(0), parts, 1, rows, c, RUN);
        self.each("batch_norm_mean", c, [parts, mean, rows_, c_, runs_]);
        let args = [input(0), input(0), mean, parts, rows_, c_, int(RUN), int(0)];
        self.launch("batch_norm_parts", [c.div_ceil(32), runs, 1], [32, 8, 1], args);
        let args = [parts, input(1), rstd, unbiased, scale, rows_, c_, runs_, Arg::Float(eps)];
        self.each("batch_norm_variance", c, args);
        self.each("normalise", x.len(), [input(0), mean, scale, input(2), y, int(x.len()), c_]);
    }

    /// Operands `dy, x, gamma, mean, rstd`; the result may lie where dy does.
    pub(super) fn batch_norm_grad(&mut self) {
        let (x, c) = (self.inputs[0], self.inputs[0].channels());
        let rows = x.len() / c;
        let runs = rows.div_ceil(RUN);
        let (of_dy, of_product) = (self.scratch(runs * c), self.scratch(runs * c));
        let terms = self.scratch(3 * c);
        let [dy, x_, gamma, mean, rstd] = [0, 1, 2, 3, 4].map(input);
        let (rows_, c_, runs_) = (int(rows), int(c), int(runs));
        self.column_sums(dy, of_dy, 1, rows, c, RUN);
        let args = [x_, dy, mean, of_product, rows_, c_, int(RUN), int(1)];
        self.launch("batch_norm_parts", [c.div_ceil(32), runs, 1], [32, 8, 1], args);
        let args = [of_dy, of_product, gamma, rstd, output(1), output(2), terms, rows_, c_, runs_];
        self.each("batch_norm_grad_terms", c, args);
        let args = [dy, x_, mean, terms, output(0), int(x.len()), c_];
        self.each("batch_norm_grad", x.len(), args);
    }

    /// Operands `x, gamma, beta, mean, variance`.
    pub(super) fn batch_norm_fixed(&mut self, eps: f32) {
        let (x, c) = (self.inputs[0], self.inputs[0].channels());
        let scale = self.scratch(c);
        let args = [input(1), input(4), scale, int(c), Arg::Float(eps)];
        self.each("batch_norm_fixed_scale", c, args);
        let args = [input(0), input(3), scale, input(2), output(0), int(x.len()), int(c)];
        self.each("normalise", x.len(), args);
    }
}

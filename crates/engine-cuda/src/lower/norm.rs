//! Normalisation layers.

use super::{Arg, Lowering, MemRef, THREADS, column_blocks, input, int, output, runs};
use ddpm_engine::ops::GroupNorm;

/// Most elements of a group that one block handles; larger or oddly sized groups are split into runs of pixels.
const MAX_GROUP_ELEMS: usize = 1 << 15;
/// Elements of such a run.
const RUN_ELEMS: usize = 1 << 13;

/// Sizes of a group norm.
struct Groups {
    n: usize,
    pixels: usize,
    c: usize,
    groups: usize,
}

impl Groups {
    /// Channels per group.
    fn per_group(&self) -> usize {
        self.c / self.groups
    }

    fn elems(&self) -> usize {
        self.pixels * self.per_group()
    }

    /// Pixels per run, and the number of runs.
    fn runs(&self) -> (usize, usize) {
        let run = (RUN_ELEMS / self.per_group()).max(1);
        (run, self.pixels.div_ceil(run))
    }

    /// How many groups a block of the whole-group kernels handles, so that it reads 32 bytes per pixel, given the element size in
    /// bytes; `None` if those kernels do not support these sizes.
    fn at_once(&self, bytes: usize) -> Option<usize> {
        let wide = [8, 4].into_iter().find(|v| self.per_group().is_multiple_of(*v)).unwrap_or(1);
        let threads = self.per_group() / wide;
        let fits = |groups: usize| self.groups.is_multiple_of(groups) && groups * threads <= 32;
        let wanted = (32 / bytes).div_ceil(self.per_group()).next_power_of_two();
        let fitting = (0..=wanted.ilog2()).rev().map(|i| 1 << i).find(|&groups| fits(groups));
        fitting.filter(|_| self.elems() <= MAX_GROUP_ELEMS && threads.is_power_of_two())
    }
}

impl Lowering<'_> {
    fn groups(&self, op: &GroupNorm) -> Groups {
        let (x, n) = (self.inputs[0], self.inputs[0].dims()[0]);
        Groups { n, pixels: x.len() / n / x.channels(), c: x.channels(), groups: op.groups }
    }

    pub(super) fn group_norm(&mut self, op: &GroupNorm) {
        let sizes = self.groups(op);
        let [pixels, c, groups, silu] = [sizes.pixels, sizes.c, op.groups, op.silu.into()].map(int);
        let (x, eps) = (input(0), Arg::Float(op.eps));
        if let Some(at_once) = sizes.at_once(self.bytes(0)) {
            let mut args = vec![x, input(1), input(2), output(0), output(1), pixels, c, groups];
            args.extend([int(at_once), eps, silu]);
            let grid = [op.groups / at_once, sizes.n, 1];
            return self.launch_all("group_norm_groups", grid, [512, 1, 1], args);
        }
        let (run, runs) = sizes.runs();
        let parts = self.scratch(2 * sizes.n * op.groups * runs);
        let grid = [runs, op.groups, sizes.n];
        self.launch("group_norm_parts", grid, [THREADS, 1, 1], [x, parts, pixels, c, groups, int(run)]);
        let y = [output(0), output(1)];
        let args = [x, input(1), input(2), parts, y[0], y[1], pixels, c, groups, int(run), eps, silu];
        self.launch("group_norm_apply", grid, [THREADS, 1, 1], args);
    }

    /// Operands `x, dy, gamma, beta, statistics`.
    pub(super) fn group_norm_grad(&mut self, op: &GroupNorm) {
        let sizes = self.groups(op);
        let Groups { n, pixels, c, groups } = sizes;
        let shares = self.scratch(n * 2 * c);
        let [x, dy, gamma, beta, stats] = [0, 1, 2, 3, 4].map(input);
        let [n_, pixels_, c_, groups_, silu] = [n, pixels, c, groups, op.silu.into()].map(int);
        if let Some(at_once) = sizes.at_once(self.bytes(0)) {
            let mut args = vec![x, dy, gamma, beta, stats, shares, output(0), pixels_, c_, groups_];
            args.extend([int(at_once), silu]);
            self.launch_all("group_norm_grad_groups", [groups / at_once, n, 1], [512, 1, 1], args);
        } else {
            let (run, runs) = runs(pixels);
            let parts = self.scratch(n * runs * 2 * c);
            let means = self.scratch(n * groups * 2);
            let args = [x, dy, gamma, beta, stats, parts, pixels_, c_, groups_, int(run), silu];
            let blocks = c.div_ceil(if sizes.per_group().is_multiple_of(4) { 128 } else { 32 });
            self.launch("group_norm_grad_parts", [blocks, runs, n], [32, 8, 1], args);
            let args = [parts, gamma, shares, means, pixels_, c_, groups_, int(runs)];
            self.launch("group_norm_grad_means", [groups, n, 1], [THREADS, 1, 1], args);
            let args = [x, dy, gamma, beta, stats, means, output(0), n_, pixels_, c_, groups_, silu];
            self.each("group_norm_grad", n * pixels * c / 4, args);
        }
        self.add_pairs(shares, [output(2), output(1)], n, c);
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
        let (run, runs) = runs(rows);
        let (parts, counters) = (self.scratch(runs * 2 * c), self.counters(column_blocks(c)));
        let [dy, x, gamma, stats] = [0, 1, 2, 3].map(input);
        let args = [dy, x, gamma, stats, output(0), int(rows), int(c)];
        self.launch("layer_norm_grad", [rows.div_ceil(8), 1, 1], [32, 8, 1], args);
        let args = [dy, x, stats, output(1), output(2), parts, counters, int(rows), int(c), int(run)];
        self.launch("layer_norm_grad_sums", [column_blocks(c), runs, 1], [32, 8, 1], args);
    }

    /// Results `y`, mean, `1 / sqrt(variance + eps)`, unbiased variance.
    pub(super) fn batch_norm(&mut self, eps: f32) {
        let (x, c) = (self.inputs[0], self.inputs[0].channels());
        let rows = x.len() / c;
        let (run, runs) = runs(rows);
        let (parts, scale, counters) =
            (self.scratch(runs * c), self.scratch(c), self.counters(column_blocks(c)));
        let [y, mean, rstd, unbiased] = [0, 1, 2, 3].map(output);
        let (grid, [rows_, c_, run]) = ([column_blocks(c), runs, 1], [rows, c, run].map(int));
        let args = [input(0), mean, parts, counters, rows_, c_, run];
        self.launch("batch_norm_mean", grid, [32, 8, 1], args);
        let args = [input(0), mean, input(1), rstd, unbiased, scale, parts, counters, rows_, c_, run];
        let args = args.into_iter().chain([Arg::Float(eps)]).collect();
        self.launch_all("batch_norm_variance", grid, [32, 8, 1], args);
        self.normalise(x.len(), [input(0), mean, scale, input(2), y], c);
    }

    /// `(x - mean) scale + shift`, from `x, mean, scale, shift` to `y`.
    fn normalise(&mut self, n: usize, [x, mean, scale, shift, y]: [Arg<MemRef>; 5], c: usize) {
        self.each("normalise", n.div_ceil(8), [x, mean, scale, shift, y, int(n), int(c)]);
    }

    /// Operands `dy, x, gamma, mean, rstd`; the result may overwrite dy.
    pub(super) fn batch_norm_grad(&mut self) {
        let (x, c) = (self.inputs[0], self.inputs[0].channels());
        let rows = x.len() / c;
        let (run, runs) = runs(rows);
        let (parts, terms) = (self.scratch(runs * 2 * c), self.scratch(3 * c));
        let counters = self.counters(column_blocks(c));
        let [dy, x_, gamma, mean, rstd] = [0, 1, 2, 3, 4].map(input);
        let [dgamma, dbeta] = [1, 2].map(output);
        let mut args = vec![dy, x_, gamma, mean, rstd, dgamma, dbeta, terms, parts, counters];
        args.extend([rows, c, run].map(int));
        self.launch_all("batch_norm_grad_sums", [column_blocks(c), runs, 1], [32, 8, 1], args);
        let args = [dy, x_, mean, terms, output(0), int(x.len()), int(c)];
        self.each("batch_norm_grad", x.len().div_ceil(8), args);
    }

    /// Operands `x, gamma, beta, mean, variance`.
    pub(super) fn batch_norm_inference(&mut self, eps: f32) {
        let (x, c) = (self.inputs[0], self.inputs[0].channels());
        let scale = self.scratch(c);
        let args = [input(1), input(4), scale, int(c), Arg::Float(eps)];
        self.each("batch_norm_inference_scale", c, args);
        self.normalise(x.len(), [input(0), input(3), scale, input(2), output(0)], c);
    }
}

//! Convolution, its data gradient and its weight gradient, as matrix products over gathered pixels ("implicit GEMM").
//!
//! Forward and data gradient are one algorithm, [`Gather`]. Every output pixel is a sum over *taps*: input pixels at
//! fixed offsets, each times its own matrix `[cin][cout]`. For the convolution the taps are the kernel's positions.
//! For the data gradient they are the same positions seen backwards; with a stride, output pixels of different
//! remainders have different taps, which makes `stride_y * stride_x` *phases*. A transposed convolution is the data
//! gradient of the convolution with its weights, so it needs nothing of its own.
//!
//! ```text
//! for each block of output pixels (a task), for each phase:
//!     for each block of k = (tap, channel):
//!         copy the pixels' inputs into A panels ("virtual im2col": never more than one block exists)
//!         for each B panel (packed weights), for each A panel: a register tile
//! ```
//!
//! [`WeightGrad`] is the product of the gathered inputs and the output gradient over pixels. Its sums are split into a
//! fixed number of pixel groups, added in order: the result does not depend on the number of threads.

use crate::isa::{Isa, dispatch};
use crate::tile::{self, K_RUN, TileShape, with_tile};
use crate::vector::map2;
use pulp::Simd;

/// Pixels whose inputs are gathered at once; with [`K_BLOCK`] sized for the second-level cache.
const PIXEL_BLOCK: usize = 192;
/// Longest run of k in one pass, so that a B panel stays in the first-level cache.
const K_BLOCK: usize = 288;
/// Pixels of a weight-gradient pass.
const GRAD_PIXELS: usize = 256;

/// The sizes of a convolution `[n, h, w, cin] -> [n, oh, ow, cout]` with weights `[kh, kw, cin, cout]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Pictures.
    pub n: usize,
    /// Input height and width.
    pub input: (usize, usize),
    /// Output height and width.
    pub output: (usize, usize),
    /// Input channels.
    pub cin: usize,
    /// Output channels.
    pub cout: usize,
    /// Kernel height and width.
    pub kernel: (usize, usize),
    /// Vertical and horizontal stride.
    pub stride: (usize, usize),
    /// Zero rows above and zero columns to the left. Below and to the right there are as many as the output needs.
    pub pad: (usize, usize),
}

impl ConvShape {
    /// Numbers in the weights.
    pub fn weights(&self) -> usize {
        self.kernel.0 * self.kernel.1 * self.cin * self.cout
    }

    /// Multiply-adds of one pass (forward, data gradient or weight gradient), padding counted.
    pub fn multiply_adds(&self) -> usize {
        self.n * self.output.0 * self.output.1 * self.weights()
    }
}

/// One tap of a phase: which weights, and which input pixel relative to the output pixel.
#[derive(Clone, Copy, Debug)]
struct Tap {
    kernel: (usize, usize),
    offset: (isize, isize),
}

#[derive(Clone, Debug)]
struct Phase {
    /// Output pixels with these remainders belong to the phase.
    remainder: (usize, usize),
    taps: Vec<Tap>,
    /// Where the phase's packed weights begin.
    packed: usize,
    /// `taps * cin`, rounded up to [`K_RUN`].
    k: usize,
}

/// A convolution or a data gradient, prepared for one instruction set.
#[derive(Clone, Debug)]
pub struct Gather {
    isa: Isa,
    tile: TileShape,
    shape: ConvShape,
    /// Data gradient: input and output, `cin` and `cout` have changed places.
    transposed: bool,
    n: usize,
    from: (usize, usize),
    to: (usize, usize),
    cin: usize,
    cout: usize,
    /// Input step of one output step inside a phase, and output step between a phase's pixels.
    step: (usize, usize),
    phase_step: (usize, usize),
    phases: Vec<Phase>,
    packed_len: usize,
}

/// What is added to the product before it is stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// `[cout]`, added to every pixel.
    pub bias: Option<&'a [f32]>,
    /// `[n, cout]`, added to every pixel of its picture (the time embedding).
    pub picture_bias: Option<&'a [f32]>,
    /// `[n, oh, ow, cout]`, added number by number (the residual).
    pub residual: Option<&'a [f32]>,
}

/// A pixel of a block: where its output goes and where its taps start.
#[derive(Clone, Copy, Default)]
struct Pixel {
    out: usize,
    picture: usize,
    y: isize,
    x: isize,
}

impl Gather {
    /// The convolution `y = x * w`.
    pub fn forward(isa: Isa, shape: ConvShape) -> Self {
        let taps = positions(shape.kernel)
            .map(|(ky, kx)| Tap {
                kernel: (ky, kx),
                offset: (ky as isize - shape.pad.0 as isize, kx as isize - shape.pad.1 as isize),
            })
            .collect();
        Self::new(isa, shape, false, vec![((0, 0), taps)])
    }

    /// The data gradient `dx` from `dy`, which is also the transposed convolution `y` from `x`.
    pub fn data_grad(isa: Isa, shape: ConvShape) -> Self {
        // Output row iy takes from input row oy where iy = oy * stride + ky - pad.
        let offset = |r: usize, pad: usize, k: usize, stride: usize| {
            let d = (r + pad) as isize - k as isize;
            (d.rem_euclid(stride as isize) == 0).then(|| d.div_euclid(stride as isize))
        };
        let phases = positions(shape.stride).map(|r| {
            let taps = positions(shape.kernel).filter_map(|kernel| {
                let y = offset(r.0, shape.pad.0, kernel.0, shape.stride.0)?;
                let x = offset(r.1, shape.pad.1, kernel.1, shape.stride.1)?;
                Some(Tap { kernel, offset: (y, x) })
            });
            (r, taps.collect())
        });
        Self::new(isa, shape, true, phases.collect())
    }

    fn new(isa: Isa, shape: ConvShape, transposed: bool, phases: Vec<((usize, usize), Vec<Tap>)>) -> Self {
        let ConvShape { n, input, output, cin, cout, stride, .. } = shape;
        let (from, to, cin, cout, step, phase_step) = match transposed {
            false => (input, output, cin, cout, stride, (1, 1)),
            true => (output, input, cout, cin, (1, 1), stride),
        };
        let tile = TileShape::pick(isa.lanes(), cout);
        let columns = cout.next_multiple_of(tile.nv * isa.lanes());
        let mut packed_len = 0;
        let phases = phases
            .into_iter()
            .map(|(remainder, taps)| {
                let k = (taps.len() * cin).next_multiple_of(K_RUN);
                let packed = packed_len;
                packed_len += k * columns;
                Phase { remainder, taps, packed, k }
            })
            .collect();
        Self { isa, tile, shape, transposed, n, from, to, cin, cout, step, phase_step, phases, packed_len }
    }

    /// Numbers of the packed weights.
    pub fn packed_len(&self) -> usize {
        self.packed_len
    }

    /// Numbers of a task's scratch memory.
    pub fn scratch_len(&self) -> usize {
        PIXEL_BLOCK.next_multiple_of(self.tile.mr) * K_BLOCK
    }

    /// Numbers of the output, `[n, h, w, cout]`.
    pub fn output_len(&self) -> usize {
        self.n * self.to.0 * self.to.1 * self.cout
    }

    /// Output pixels of a task: enough work to be worth waking for, few enough to share a small picture.
    pub fn task_pixels(&self) -> usize {
        let k: usize = self.phases.iter().map(|p| p.k).sum::<usize>() / self.phases.len().max(1);
        let wanted = (4 << 20) / (k * self.cout).max(1);
        let blocks = wanted.div_ceil(PIXEL_BLOCK).clamp(1, 16);
        let pixels = self.n * self.to.0 * self.to.1;
        (blocks * PIXEL_BLOCK).min(pixels.div_ceil(8).next_multiple_of(48)).max(1)
    }

    /// Columns of a packed panel.
    fn nr(&self) -> usize {
        self.tile.nv * self.isa.lanes()
    }

    /// Channels of the output.
    pub fn output_channels(&self) -> usize {
        self.cout
    }

    /// Phases; their packed weights stand one behind the other, [`Gather::panel_count`] panels each.
    pub fn phase_count(&self) -> usize {
        self.phases.len()
    }

    /// Panels of packed weights in each phase.
    pub fn panel_count(&self) -> usize {
        self.cout.div_ceil(self.nr())
    }

    /// Numbers of one panel of a phase.
    pub fn panel_len(&self, phase: usize) -> usize {
        self.phases[phase].k * self.nr()
    }

    /// Packs the weights `[kh, kw, shape.cin, shape.cout]` of panel `panel` (all columns `panel * nr ..` of `phase`).
    pub fn pack_panel(&self, phase: usize, panel: usize, weights: &[f32], out: &mut [f32]) {
        let (nr, phase) = (self.nr(), &self.phases[phase]);
        let columns = panel * nr..self.cout.min((panel + 1) * nr);
        let (kw, shape_cout) = (self.shape.kernel.1, self.shape.cout);
        out[phase.taps.len() * self.cin * nr..].fill(0.0);
        for (t, tap) in phase.taps.iter().enumerate() {
            let matrix = (tap.kernel.0 * kw + tap.kernel.1) * self.cin * self.cout;
            for (ci, row) in out[t * self.cin * nr..][..self.cin * nr].chunks_exact_mut(nr).enumerate() {
                let (row, rest) = row.split_at_mut(columns.len());
                rest.fill(0.0);
                if self.transposed {
                    let source = weights[matrix + columns.start * shape_cout..].chunks(shape_cout);
                    for (r, w) in row.iter_mut().zip(source) {
                        *r = w[ci];
                    }
                } else {
                    row.copy_from_slice(&weights[matrix + ci * shape_cout..][columns.clone()]);
                }
            }
        }
    }

    /// Packs all weights.
    pub fn pack(&self, weights: &[f32], packed: &mut [f32]) {
        assert_eq!(weights.len(), self.shape.weights());
        let mut rest = packed;
        for phase in 0..self.phase_count() {
            for panel in 0..self.panel_count() {
                let (part, tail) = rest.split_at_mut(self.panel_len(phase));
                self.pack_panel(phase, panel, weights, part);
                rest = tail;
            }
        }
    }

    /// Computes the output pixels `first ..` that `out` holds, from the whole `input`.
    ///
    /// `input` is `[n, h, w, cin]`, `out` is any run of whole pixels of the output, `scratch` has
    /// [`Gather::scratch_len`] numbers.
    pub fn run(
        &self,
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        first: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(input.len(), self.n * self.from.0 * self.from.1 * self.cin);
        assert_eq!(packed.len(), self.packed_len);
        assert_eq!(out.len() % self.cout, 0);
        let pixels = out.len() / self.cout;
        let mut block = [Pixel::default(); PIXEL_BLOCK];
        for phase in &self.phases {
            let mut filled = 0;
            for p in first..first + pixels {
                let (rest, x) = (p / self.to.1, p % self.to.1);
                let (picture, y) = (rest / self.to.0, rest % self.to.0);
                if y % self.phase_step.0 != phase.remainder.0 || x % self.phase_step.1 != phase.remainder.1 {
                    continue;
                }
                block[filled] = Pixel {
                    out: p,
                    picture,
                    y: (y / self.phase_step.0 * self.step.0) as isize,
                    x: (x / self.phase_step.1 * self.step.1) as isize,
                };
                filled += 1;
                if filled == PIXEL_BLOCK {
                    self.block(phase, &block, input, packed, epilogue, first, out, scratch);
                    filled = 0;
                }
            }
            if filled > 0 {
                self.block(phase, &block[..filled], input, packed, epilogue, first, out, scratch);
            }
        }
    }

    fn block(
        &self,
        phase: &Phase,
        pixels: &[Pixel],
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        first: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        dispatch!(self.isa, s => self.block_generic(s, phase, pixels, input, packed, epilogue, first, out, scratch))
    }

    #[inline(always)]
    fn block_generic<S: Simd>(
        &self,
        s: S,
        phase: &Phase,
        pixels: &[Pixel],
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        first: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        for pixel in pixels {
            self.start(s, pixel, epilogue, &mut out[(pixel.out - first) * self.cout..][..self.cout]);
        }
        let columns = self.cout.div_ceil(self.nr());
        let blocks = phase.k.div_ceil(K_BLOCK).max(1);
        let k_block = phase.k.div_ceil(blocks).next_multiple_of(K_RUN);
        for k0 in (0..phase.k).step_by(k_block.max(1)) {
            let k = k_block.min(phase.k - k0);
            let panels = pixels.len().div_ceil(self.tile.mr);
            let a = &mut scratch[..panels * self.tile.mr * k];
            for (panel, pixels) in a.chunks_exact_mut(self.tile.mr * k).zip(pixels.chunks(self.tile.mr)) {
                self.gather(phase, pixels, input, k0, k, panel);
            }
            for j in 0..columns {
                let b = &packed[phase.packed + (j * phase.k + k0) * self.nr()..][..k * self.nr()];
                self.panel(s, pixels, a, b, k, j, first, out);
            }
        }
    }

    /// Puts what the epilogue adds into an output pixel, so that all blocks of k only add.
    #[inline(always)]
    fn start<S: Simd>(&self, s: S, pixel: &Pixel, epilogue: Epilogue<'_>, out: &mut [f32]) {
        match epilogue.bias {
            Some(bias) => copy_short(out, bias),
            None => out.fill(0.0),
        }
        if let Some(b) = epilogue.picture_bias {
            map2(
                s,
                out,
                &b[pixel.picture * self.cout..][..self.cout],
                #[inline(always)]
                |o, a| s.add_f32s(o, a),
            );
        }
        if let Some(r) = epilogue.residual {
            map2(
                s,
                out,
                &r[pixel.out * self.cout..][..self.cout],
                #[inline(always)]
                |o, a| s.add_f32s(o, a),
            );
        }
    }

    /// Copies the inputs `k0 .. k0 + k` of up to `mr` pixels into a blocked A panel.
    #[inline(always)]
    fn gather(&self, phase: &Phase, pixels: &[Pixel], input: &[f32], k0: usize, k: usize, panel: &mut [f32]) {
        let (mr, (h, w), cin) = (self.tile.mr, self.from, self.cin);
        let (first_tap, first_channel) = (k0 / cin, k0 % cin);
        for r in 0..mr {
            let Some(pixel) = pixels.get(r) else {
                for run in panel[r * K_RUN..].chunks_mut(mr * K_RUN) {
                    run[..K_RUN].fill(0.0);
                }
                continue;
            };
            let picture = pixel.picture * h * w;
            let (mut at, mut c) = (0, first_channel); // place in 0..k, channel of the tap
            for tap in &phase.taps[first_tap..] {
                let len = (cin - c).min(k - at);
                // Above or left of the picture wraps around to beyond its other end.
                let y = pixel.y.wrapping_add(tap.offset.0) as usize;
                let x = pixel.x.wrapping_add(tap.offset.1) as usize;
                if y < h && x < w {
                    let from = (picture + y * w + x) * cin + c;
                    put(panel, mr, r, at, len, Some(&input[from..from + len]));
                } else {
                    put(panel, mr, r, at, len, None);
                }
                (at, c) = (at + len, 0);
                if at == k {
                    break;
                }
            }
            put(panel, mr, r, at, k - at, None);
        }
    }

    /// All A panels of a block against one B panel.
    #[inline(always)]
    fn panel<S: Simd>(
        &self,
        s: S,
        pixels: &[Pixel],
        a: &[f32],
        b: &[f32],
        k: usize,
        j: usize,
        first: usize,
        out: &mut [f32],
    ) {
        let columns = j * self.nr()..self.cout.min((j + 1) * self.nr());
        let b = S::as_simd_f32s(b).0;
        let row = |pixel: &Pixel| (pixel.out - first) * self.cout + columns.start;
        with_tile!(self.tile, blocked_panels::<S>(s, pixels, a, b, k, &row, columns.len(), out));
    }
}

#[inline(always)]
fn blocked_panels<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    pixels: &[Pixel],
    a: &[f32],
    b: &[S::f32s],
    k: usize,
    row: &impl Fn(&Pixel) -> usize,
    columns: usize,
    out: &mut [f32],
) {
    for (a, pixels) in a.chunks_exact(MR * k).zip(pixels.chunks(MR)) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::blocked(s, a, b, &mut acc);
        for (acc, pixel) in acc.iter().zip(pixels) {
            let at = row(pixel);
            tile::store_row(s, acc, &mut out[at..at + columns], true);
        }
    }
}

/// Copies `len` numbers (zeros without a source) to places `at ..` of row `r` of a blocked panel.
#[inline(always)]
fn put(panel: &mut [f32], mr: usize, r: usize, at: usize, len: usize, source: Option<&[f32]>) {
    if len == 0 {
        return;
    }
    if at.is_multiple_of(K_RUN) && len.is_multiple_of(K_RUN) {
        let runs = panel[(at / K_RUN * mr + r) * K_RUN..].chunks_mut(mr * K_RUN).take(len / K_RUN);
        match source {
            Some(source) => {
                for (run, source) in runs.zip(source.chunks_exact(K_RUN)) {
                    run[..K_RUN].copy_from_slice(source);
                }
            }
            None => runs.for_each(|run| run[..K_RUN].fill(0.0)),
        }
    } else {
        for i in 0..len {
            let k = at + i;
            panel[(k / K_RUN * mr + r) * K_RUN + k % K_RUN] = source.map_or(0.0, |s| s[i]);
        }
    }
}

fn positions(size: (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    (0..size.0).flat_map(move |y| (0..size.1).map(move |x| (y, x)))
}

/// The weight gradient of a convolution, with the bias gradient as its last row, prepared for one instruction set.
///
/// The rows of the result are `m = (ky, kx, ci)`, then one row for the bias (an input that is always 1). A task is a
/// (group of pixels, range of rows); each writes its own part of a partial result, and [`WeightGrad::reduce`] adds
/// the groups in order.
#[derive(Clone, Debug)]
pub struct WeightGrad {
    isa: Isa,
    tile: TileShape,
    shape: ConvShape,
    /// `kh * kw * cin + 1`.
    m: usize,
    groups: usize,
    ranges: usize,
    /// Rows of a range, a multiple of the tile's rows.
    range: usize,
}

impl WeightGrad {
    /// Prepares; the split into tasks depends on the sizes alone.
    pub fn new(isa: Isa, shape: ConvShape) -> Self {
        let tile = TileShape::pick(isa.lanes(), shape.cout);
        let m = shape.kernel.0 * shape.kernel.1 * shape.cin + 1;
        let pixels = shape.n * shape.output.0 * shape.output.1;
        // A task's part of the result should stay in the second-level cache.
        let ranges = (m * shape.cout).div_ceil(96 << 10);
        let range = m.div_ceil(ranges).next_multiple_of(tile.mr);
        let ranges = m.div_ceil(range);
        let groups = 8usize.div_ceil(ranges).min(pixels.div_ceil(GRAD_PIXELS)).max(1);
        Self { isa, tile, shape, m, groups, ranges, range }
    }

    /// Tasks; each has its own part of the partial results.
    pub fn tasks(&self) -> usize {
        self.groups * self.ranges
    }

    /// Numbers of a task's part of the partial results.
    pub fn partial_len(&self) -> usize {
        self.range * self.shape.cout
    }

    /// Numbers of a task's scratch memory.
    pub fn scratch_len(&self) -> usize {
        let nr = self.tile.nv * self.isa.lanes();
        GRAD_PIXELS * (self.range + self.shape.cout.next_multiple_of(nr) + self.range)
    }

    /// Runs one task: `input` is `[n, h, w, cin]`, `dy` is `[n, oh, ow, cout]`, `partial` the task's part.
    pub fn run(&self, task: usize, input: &[f32], dy: &[f32], partial: &mut [f32], scratch: &mut [f32]) {
        let (ConvShape { n, input: (h, w), output: (oh, ow), cin, cout, .. }, mr) =
            (self.shape, self.tile.mr);
        assert_eq!(input.len(), n * h * w * cin);
        assert_eq!(dy.len(), n * oh * ow * cout);
        let (group, range) = (task / self.ranges, task % self.ranges);
        let rows = range * self.range..self.m.min((range + 1) * self.range);
        let pixels = n * oh * ow;
        let share = pixels.div_ceil(self.groups);
        let nr = self.tile.nv * self.isa.lanes();
        let (a, rest) = scratch.split_at_mut(GRAD_PIXELS * self.range);
        let (b, row) = rest.split_at_mut(GRAD_PIXELS * cout.next_multiple_of(nr));
        let row = &mut row[..rows.len().next_multiple_of(mr)];
        row.fill(0.0);
        partial.fill(0.0);
        let end = pixels.min((group + 1) * share);
        for start in (group * share..end).step_by(GRAD_PIXELS) {
            let k = GRAD_PIXELS.min(end - start);
            dispatch!(self.isa, s => self.block(s, rows.clone(), start, k, input, dy, a, b, row, partial));
        }
    }

    /// The pixels `start .. start + k` of a task.
    #[inline(always)]
    fn block<S: Simd>(
        &self,
        s: S,
        rows: std::ops::Range<usize>,
        start: usize,
        k: usize,
        input: &[f32],
        dy: &[f32],
        a: &mut [f32],
        b: &mut [f32],
        row: &mut [f32],
        partial: &mut [f32],
    ) {
        let (cout, mr, nr) = (self.shape.cout, self.tile.mr, self.tile.nv * S::F32_LANES);
        let (first_tap, first_channel) = (rows.start / self.shape.cin, rows.start % self.shape.cin);
        for p in 0..k {
            self.gather_row(start + p, first_tap, first_channel, rows.len(), input, row);
            with_tile!(self.tile, scatter_row::<S>(row, k, p, a));
            for (j, part) in dy[(start + p) * cout..][..cout].chunks(nr).enumerate() {
                let to = &mut b[(j * k + p) * nr..][..nr];
                copy_short(&mut to[..part.len()], part);
                to[part.len()..].fill(0.0);
            }
        }
        debug_assert_eq!(row.len() % mr, 0);
        self.product(s, rows.len(), k, a, b, partial);
    }

    /// The inputs of one output pixel for the given rows: its part of the im2col matrix, and 1 for the bias.
    #[inline(always)]
    fn gather_row(
        &self,
        pixel: usize,
        first_tap: usize,
        first_channel: usize,
        rows: usize,
        input: &[f32],
        out: &mut [f32],
    ) {
        let ConvShape { input: (h, w), output: (oh, ow), cin, kernel, stride, pad, .. } = self.shape;
        let (rest, ox) = (pixel / ow, pixel % ow);
        let (picture, oy) = (rest / oh, rest % oh);
        let (mut ky, mut kx) = (first_tap / kernel.1, first_tap % kernel.1);
        let (mut at, mut c) = (0, first_channel);
        while at < rows {
            if ky == kernel.0 {
                out[at] = 1.0;
                break;
            }
            let len = (cin - c).min(rows - at);
            let y = (oy * stride.0 + ky).wrapping_sub(pad.0);
            let x = (ox * stride.1 + kx).wrapping_sub(pad.1);
            let to = &mut out[at..at + len];
            if y < h && x < w {
                copy_short(to, &input[((picture * h + y) * w + x) * cin + c..][..len]);
            } else {
                to.fill(0.0);
            }
            (at, c, kx) = (at + len, 0, kx + 1);
            if kx == kernel.1 {
                (ky, kx) = (ky + 1, 0);
            }
        }
    }

    #[inline(always)]
    fn product<S: Simd>(&self, s: S, rows: usize, k: usize, a: &[f32], b: &[f32], partial: &mut [f32]) {
        let cout = self.shape.cout;
        let nr = self.tile.nv * S::F32_LANES;
        for (j, b) in b.chunks_exact(k * nr).take(cout.div_ceil(nr)).enumerate() {
            let b = S::as_simd_f32s(b).0;
            let columns = j * nr..cout.min((j + 1) * nr);
            with_tile!(self.tile, column_panels::<S>(s, rows, k, a, b, columns.clone(), cout, partial));
        }
    }

    /// Adds the groups' partial results in order: `dw` is `[kh, kw, cin, cout]`, `db` is `[cout]`.
    pub fn reduce(&self, partials: &[f32], dw: &mut [f32], db: Option<&mut [f32]>) {
        let len = self.partial_len();
        assert_eq!(dw.len(), self.shape.weights());
        for (range, out) in dw.chunks_mut(len).enumerate() {
            self.reduce_range(partials, range, 0, out);
        }
        if let Some(db) = db {
            self.reduce_bias(partials, db);
        }
    }

    /// The bias gradient `[cout]`: the last row of the result.
    pub fn reduce_bias(&self, partials: &[f32], db: &mut [f32]) {
        let (range, row) = ((self.m - 1) / self.range, (self.m - 1) % self.range);
        self.reduce_range(partials, range, row * self.shape.cout, db);
    }

    /// Adds the groups' rows of one range, from number `from` of the range's part on.
    pub fn reduce_range(&self, partials: &[f32], range: usize, from: usize, out: &mut [f32]) {
        let len = self.partial_len();
        for group in 0..self.groups {
            let part = &partials[(group * self.ranges + range) * len + from..][..out.len()];
            if group == 0 {
                out.copy_from_slice(part);
            } else {
                for (o, p) in out.iter_mut().zip(part) {
                    *o += p;
                }
            }
        }
    }
}

/// Puts row `p` of `k` into column panels `[panel][k][MR]`.
#[inline(always)]
fn scatter_row<S: Simd, const MR: usize, const NV: usize>(row: &[f32], k: usize, p: usize, a: &mut [f32]) {
    for (part, panel) in row.chunks_exact(MR).zip(a.chunks_exact_mut(k * MR)) {
        let to = &mut panel[p * MR..][..MR];
        for r in 0..MR {
            to[r] = part[r];
        }
    }
}

/// `copy_from_slice` for a few numbers, without the call.
#[inline(always)]
fn copy_short(to: &mut [f32], from: &[f32]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = *f;
    }
}

#[inline(always)]
fn column_panels<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    rows: usize,
    k: usize,
    a: &[f32],
    b: &[S::f32s],
    columns: std::ops::Range<usize>,
    cout: usize,
    partial: &mut [f32],
) {
    for (i, a) in a.chunks_exact(MR * k).take(rows.div_ceil(MR)).enumerate() {
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::columns(s, a, b, &mut acc);
        for (r, acc) in acc.iter().enumerate().take(rows - i * MR) {
            let at = (i * MR + r) * cout;
            tile::store_row(s, acc, &mut partial[at + columns.start..at + columns.end], true);
        }
    }
}

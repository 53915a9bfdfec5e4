//! Convolution and data gradient: register tiles over gathered pixels.

use super::epilogue::{Epilogue, Pixel, finish_row};
use super::row::Row;
use super::{ConvShape, MAX_PANEL_COLUMNS, MatmulDtype, PixelCursor};
use crate::bf16::{self, Packing};
use crate::isa::{Isa, dispatch};
use crate::tile::{self, K_RUN, MAX_TILE_ELEMS, PackLanes, TileShape, with_tile};
use pulp::Simd;
use std::ops::Range;

/// Pixels whose inputs are gathered at once; sized with [`K_BLOCK`] for the L2 cache.
const PIXEL_BLOCK: usize = 192;
/// Maximum length of k in one pass, about what the L1 cache holds of a B panel; longer accumulation chains
/// are also less accurate.
const K_BLOCK: usize = 288;
/// Maximum length of weights, in words, that are close enough to be re-read for every panel of pixels.
const L2_ELEMS: usize = 96 << 10;

/// Maximum number of output pixels for which tasks are split by columns.
const MAX_COLUMN_TASK_PIXELS: usize = 192;
/// Number of tasks when split by columns, if there are enough columns.
const COLUMN_TASKS: usize = 8;
/// Minimum number of columns of such a task, to amortise gathering the inputs of all pixels.
const MIN_TASK_COLUMNS: usize = 64;

/// One tap of a phase: a kernel position, and the input pixel relative to the output pixel.
#[derive(Clone, Copy, Debug)]
struct Tap {
    kernel: (usize, usize),
    offset: (isize, isize),
}

#[derive(Clone, Debug)]
struct Phase {
    /// The phase computes the output pixels with these remainders.
    remainder: (usize, usize),
    taps: Vec<Tap>,
    /// Offset of the phase's packed weights.
    packed: usize,
    /// `taps * cin` in words, rounded up to [`K_RUN`].
    k: usize,
}

/// A convolution or a data gradient, prepared for one instruction set.
#[derive(Clone, Debug)]
pub struct ImplicitGemm {
    isa: Isa,
    tile: TileShape,
    packing: Packing,
    shape: ConvShape,
    /// Data gradient: input and output, `cin` and `cout` are swapped.
    transposed: bool,
    n: usize,
    from: (usize, usize),
    to: (usize, usize),
    cin: usize,
    cout: usize,
    /// Input step for each output step within a phase, and output step between a phase's pixels.
    step: (usize, usize),
    phase_step: (usize, usize),
    phases: Vec<Phase>,
    packed_len: usize,
}

impl ImplicitGemm {
    /// The convolution `y = x * w`.
    pub fn forward(isa: Isa, dtype: MatmulDtype, shape: ConvShape) -> Self {
        let taps = positions(shape.kernel)
            .map(|(ky, kx)| Tap {
                kernel: (ky, kx),
                offset: (ky as isize - shape.pad.0 as isize, kx as isize - shape.pad.1 as isize),
            })
            .collect();
        Self::new(isa, dtype, shape, false, vec![((0, 0), taps)])
    }

    /// The data gradient `dx` from `dy`, which is also the transposed convolution `y` from `x`.
    pub fn data_grad(isa: Isa, dtype: MatmulDtype, shape: ConvShape) -> Self {
        // Output row iy reads input row oy where iy = oy * stride + ky - pad.
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
        Self::new(isa, dtype, shape, true, phases.collect())
    }

    fn new(
        isa: Isa,
        dtype: MatmulDtype,
        shape: ConvShape,
        transposed: bool,
        phases: Vec<((usize, usize), Vec<Tap>)>,
    ) -> Self {
        let ConvShape { n, input, output, cin, cout, stride, .. } = shape;
        let (from, to, cin, cout, step, phase_step) = match transposed {
            false => (input, output, cin, cout, stride, (1, 1)),
            true => (output, input, cout, cin, (1, 1), stride),
        };
        let (tile, packing) = (TileShape::pick(isa.lanes(), cout), isa.packing(dtype));
        let columns = cout.next_multiple_of(tile.nv * isa.lanes());
        let mut packed_len = 0;
        let phases = phases
            .into_iter()
            .map(|(remainder, taps)| {
                let k = (taps.len() * cin).div_ceil(packing.elems_per_word()).next_multiple_of(K_RUN);
                let packed = packed_len;
                packed_len += k * columns;
                Phase { remainder, taps, packed, k }
            })
            .collect();
        Self {
            isa,
            tile,
            packing,
            shape,
            transposed,
            n,
            from,
            to,
            cin,
            cout,
            step,
            phase_step,
            phases,
            packed_len,
        }
    }

    /// Length of the packed weights, in words.
    pub fn packed_len(&self) -> usize {
        self.packed_len
    }

    /// Scratch length of a task, in f32s.
    pub fn scratch_len(&self) -> usize {
        PIXEL_BLOCK.next_multiple_of(self.tile.mr) * K_BLOCK
    }

    /// Length of the output, `[n, h, w, cout]`.
    pub fn output_len(&self) -> usize {
        self.n * self.to.0 * self.to.1 * self.cout
    }

    /// Output pixels of a task: enough work to be worth a wake-up, few enough to split a small image.
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

    /// Number of phases; their packed weights are contiguous, [`ImplicitGemm::panel_count`] panels each.
    pub fn phase_count(&self) -> usize {
        self.phases.len()
    }

    /// Panels of packed weights in each phase.
    pub fn panel_count(&self) -> usize {
        self.cout.div_ceil(self.nr())
    }

    /// Length of one panel of a phase, in words.
    pub fn panel_len(&self, phase: usize) -> usize {
        self.phases[phase].k * self.nr()
    }

    /// Packs the weights `[kh, kw, shape.cin, shape.cout]` of panel `panel` (all columns `panel * nr ..` of `phase`).
    pub fn pack_panel(&self, phase: usize, panel: usize, weights: &[f32], out: &mut [f32]) {
        let (nr, phase) = (self.nr(), &self.phases[phase]);
        let columns = panel * nr..self.cout.min((panel + 1) * nr);
        let rows = phase.taps.len() * self.cin;
        match self.packing {
            Packing::F32 | Packing::Rounded => {
                out[rows * nr..].fill(0.0);
                for (row, out) in out.chunks_exact_mut(nr).take(rows).enumerate() {
                    self.weight_row(phase, row, columns.clone(), weights, out);
                }
                self.packing.round(&mut out[..rows * nr]);
            }
            Packing::Pairs => {
                let mut pair = [[0.0; MAX_PANEL_COLUMNS]; 2];
                for (word, out) in out.chunks_exact_mut(nr).enumerate() {
                    for (i, half) in pair.iter_mut().enumerate() {
                        match 2 * word + i {
                            row if row < rows => {
                                self.weight_row(phase, row, columns.clone(), weights, &mut half[..nr]);
                            }
                            _ => half.fill(0.0),
                        }
                    }
                    bf16::pair_rows(&pair[0], &pair[1], out);
                }
            }
        }
    }

    /// Copies row `row` of a phase's weights, `(tap, channel)`, for the given columns, padded with zeros.
    #[inline(always)]
    fn weight_row(&self, phase: &Phase, row: usize, columns: Range<usize>, weights: &[f32], out: &mut [f32]) {
        let (tap, ci) = (&phase.taps[row / self.cin], row % self.cin);
        let matrix = (tap.kernel.0 * self.shape.kernel.1 + tap.kernel.1) * self.cin * self.cout;
        let (out, rest) = out.split_at_mut(columns.len());
        rest.fill(0.0);
        if self.transposed {
            let source = weights[matrix + columns.start * self.cin + ci..].iter().step_by(self.cin);
            for (to, w) in out.iter_mut().zip(source) {
                *to = *w;
            }
        } else {
            out.copy_from_slice(&weights[matrix + ci * self.cout..][columns]);
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

    /// Panels of a task of [`ImplicitGemm::run_panels`], if tasks should be split by columns: the pixels are
    /// so few that each task computes them all, and most of the memory traffic is weights.
    pub fn task_panels(&self) -> Option<usize> {
        let pixels = self.n * self.to.0 * self.to.1;
        let panels = self.panel_count().div_ceil(COLUMN_TASKS).max(MIN_TASK_COLUMNS / self.nr());
        (pixels <= MAX_COLUMN_TASK_PIXELS && panels < self.panel_count()).then_some(panels)
    }

    /// Columns of that many panels.
    pub fn columns_of(&self, panels: usize) -> usize {
        panels * self.nr()
    }

    /// Columns of these panels.
    fn columns(&self, panels: Range<usize>) -> Range<usize> {
        panels.start * self.nr()..self.cout.min(panels.end * self.nr())
    }

    /// Computes the output pixels `first ..` that fit into `out`, from the entire `input`.
    ///
    /// `input` is `[n, h, w, cin]`, `out` is any run of pixels of the output, `scratch` has length
    /// [`ImplicitGemm::scratch_len`].
    pub fn run(
        &self,
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        first: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        self.run_part(input, packed, epilogue, first, 0..self.panel_count(), out, scratch);
    }

    /// Computes the columns of panels `panels` for all output pixels, `[pixels][columns]`; otherwise like
    /// [`ImplicitGemm::run`].
    pub fn run_panels(
        &self,
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        panels: Range<usize>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(out.len(), self.output_len() / self.cout * self.columns(panels.clone()).len());
        self.run_part(input, packed, epilogue, 0, panels, out, scratch);
    }

    /// Computes the pixels `first ..` that fit into `out`, in the columns of `panels`.
    fn run_part(
        &self,
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        first: usize,
        panels: Range<usize>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(input.len(), self.n * self.from.0 * self.from.1 * self.cin);
        assert_eq!(packed.len(), self.packed_len);
        let width = self.columns(panels.clone()).len();
        assert_eq!(out.len() % width, 0);
        let pixels = out.len() / width;
        let to = Target { first, panels, width };
        let mut block = [Pixel::default(); PIXEL_BLOCK];
        for phase in &self.phases {
            let mut filled = 0;
            let mut cursor = PixelCursor::new(first, self.to);
            // The step is mostly 1, which needs no division.
            let in_steps = |i: usize, step: usize, remainder: usize| match step {
                1 => Some(i),
                _ => (i % step == remainder).then_some(i / step),
            };
            for p in first..first + pixels {
                let PixelCursor { image, y, x, .. } = cursor;
                cursor.advance();
                let Some(y) = in_steps(y, self.phase_step.0, phase.remainder.0) else { continue };
                let Some(x) = in_steps(x, self.phase_step.1, phase.remainder.1) else { continue };
                let (y, x) = ((y * self.step.0) as isize, (x * self.step.1) as isize);
                block[filled] = Pixel { out: p, image, y, x };
                filled += 1;
                if filled == PIXEL_BLOCK {
                    self.block(phase, &block, input, packed, epilogue, &to, out, scratch);
                    filled = 0;
                }
            }
            if filled > 0 {
                self.block(phase, &block[..filled], input, packed, epilogue, &to, out, scratch);
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
        to: &Target,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        dispatch!(self.isa, self.packing, s, dot => self.block_generic(
            s, dot, phase, pixels, input, packed, epilogue, to, out, scratch
        ))
    }

    #[inline(always)]
    fn block_generic<S: Simd>(
        &self,
        s: S,
        dot: impl PackLanes,
        phase: &Phase,
        pixels: &[Pixel],
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
        to: &Target,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let all = self.columns(to.panels.clone());
        if phase.k == 0 {
            // No taps: the output is just the epilogue.
            for pixel in pixels {
                let row = &mut out[(pixel.out - to.first) * to.width..][..to.width];
                row.fill(0.0);
                epilogue.add(s, pixel, all.start, self.cout, row);
            }
        }
        let blocks = phase.k.div_ceil(K_BLOCK).max(1);
        let k_block = phase.k.div_ceil(blocks).next_multiple_of(K_RUN);
        for k0 in (0..phase.k).step_by(k_block.max(1)) {
            let k = k_block.min(phase.k - k0);
            let panels = pixels.len().div_ceil(self.tile.mr);
            let a = &mut scratch[..panels * self.tile.mr * k];
            for (panel, pixels) in a.chunks_exact_mut(self.tile.mr * k).zip(pixels.chunks(self.tile.mr)) {
                self.gather(s, dot, phase, pixels, input, k0, k, panel);
                self.packing.round(panel);
            }
            let b = &packed[phase.packed + to.panels.start * phase.k * self.nr()..];
            let tiles = Tiles {
                pixels,
                a,
                b: &b[..phase.k * to.panels.len() * self.nr()],
                panels: (phase.k, to.panels.len()),
                run: (k0, k),
                cout: self.cout,
                columns: (all.start, all.end),
                first: to.first,
            };
            let epilogue = (k0 == 0).then_some(epilogue);
            with_tile!(self.tile, all_tiles::<S>(s, dot, tiles, epilogue, out));
        }
    }

    /// Packs the inputs of the words `k0 .. k0 + k` of up to `mr` pixels into a blocked A panel.
    #[inline(always)]
    fn gather<S: Simd>(
        &self,
        s: S,
        dot: impl PackLanes,
        phase: &Phase,
        pixels: &[Pixel],
        input: &[f32],
        k0: usize,
        k: usize,
        panel: &mut [f32],
    ) {
        let (mr, (h, w), cin) = (self.tile.mr, self.from, self.cin);
        let (k0, k) = (k0 * self.packing.elems_per_word(), k * self.packing.elems_per_word());
        let (first_tap, first_channel) = (k0 / cin, k0 % cin);
        for r in 0..mr {
            let mut to = Row { panel, mr, r, packing: self.packing };
            let Some(pixel) = pixels.get(r) else {
                to.put(s, dot, 0, k, None);
                continue;
            };
            let image = pixel.image * h * w;
            let (mut at, mut c) = (0, first_channel); // position in 0..k, channel of the tap
            for tap in &phase.taps[first_tap..] {
                let len = (cin - c).min(k - at);
                // Coordinates above or left of the image wrap around and fail the bounds check.
                let y = pixel.y.wrapping_add(tap.offset.0) as usize;
                let x = pixel.x.wrapping_add(tap.offset.1) as usize;
                if y < h && x < w {
                    let from = (image + y * w + x) * cin + c;
                    to.put(s, dot, at, len, Some(&input[from..from + len]));
                } else {
                    to.put(s, dot, at, len, None);
                }
                (at, c) = (at + len, 0);
                if at == k {
                    break;
                }
            }
            to.put(s, dot, at, k - at, None);
        }
    }
}

/// The part of the output to compute: pixels from `first` on, the columns of `panels`, `width` in all.
struct Target {
    first: usize,
    panels: Range<usize>,
    width: usize,
}

/// A block of pixels and a run of k: the A panels of the pixels, and the weights.
#[derive(Clone, Copy)]
struct Tiles<'a> {
    pixels: &'a [Pixel],
    a: &'a [f32],
    /// The phase's weights for these columns.
    b: &'a [f32],
    /// Length of k in the phase, and number of B panels.
    panels: (usize, usize),
    /// The run of k: start and length.
    run: (usize, usize),
    cout: usize,
    /// First column in `out`, and the end.
    columns: (usize, usize),
    /// First pixel in `out`.
    first: usize,
}

/// All tiles of a block. The first run of k adds the epilogue, the others accumulate into `out`.
#[inline(always)]
fn all_tiles<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl PackLanes,
    tiles: Tiles<'_>,
    epilogue: Option<Epilogue<'_>>,
    out: &mut [f32],
) {
    let Tiles { pixels, a, b, panels: (phase_k, panels), run: (k0, k), cout, columns: (from, end), first } =
        tiles;
    let (nr, rows) = (NV * S::F32_LANES, pixels.len().div_ceil(MR));
    // Pixel-major order writes the output sequentially, but re-reads the weights for each panel of pixels, so
    // they must fit a near cache.
    let by_pixels = k * panels * nr <= L2_ELEMS;
    let mut sums = [0.0; MAX_TILE_ELEMS];
    let (mut i, mut j) = (0, 0);
    for _ in 0..rows * panels {
        let b = S::as_simd_f32s(&b[(j * phase_k + k0) * nr..][..k * nr]).0;
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::blocked(s, dot, &a[i * MR * k..][..MR * k], b, &mut acc);
        let pixels = &pixels[i * MR..pixels.len().min((i + 1) * MR)];
        let columns = j * nr..(end - from).min((j + 1) * nr);
        tile::store_acc::<S, MR, NV>(&acc, &mut sums);
        for (sums, pixel) in sums.chunks_exact(nr).zip(pixels) {
            let row = &mut out[(pixel.out - first) * (end - from) + columns.start..][..columns.len()];
            finish_row::<S, NV>(s, sums, pixel, epilogue, from + columns.start, cout, row);
        }
        (i, j) = match by_pixels {
            true if j + 1 == panels => (i + 1, 0),
            true => (i, j + 1),
            false if i + 1 == rows => (0, j + 1),
            false => (i + 1, j),
        };
    }
}

fn positions(size: (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    (0..size.0).flat_map(move |y| (0..size.1).map(move |x| (y, x)))
}

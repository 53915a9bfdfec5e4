//! Convolution and data gradient: register tiles over gathered pixels. Sizes and packed weights are here, the
//! computation is in `run.rs`.

mod run;

use super::{ConvShape, MAX_PANEL_COLUMNS, MatmulDtype};
use crate::bf16::{self, Packing};
use crate::isa::Isa;
use crate::tile::{K_RUN, TileShape};
use std::ops::Range;

/// Pixels whose inputs are gathered at once; sized with [`K_BLOCK`] for the L2 cache.
const PIXEL_BLOCK: usize = 192;
/// Maximum length of k in one pass, about what the L1 cache holds of a B panel; longer accumulation chains
/// are also less accurate.
const K_BLOCK: usize = 288;

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
        let (from, to, cin, cout, step, phase_step) = if transposed {
            (output, input, cout, cin, (1, 1), stride)
        } else {
            (input, output, cin, cout, stride, (1, 1))
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
}

fn positions(size: (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    (0..size.0).flat_map(move |y| (0..size.1).map(move |x| (y, x)))
}

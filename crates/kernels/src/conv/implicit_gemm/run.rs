//! The computation: blocks of pixels, gathered into A panels, against panels of weights.

use super::super::epilogue::{Epilogue, Pixel, finish_row};
use super::super::row::Row;
use super::super::{Operands, PixelCursor};
use super::{ImplicitGemm, K_BLOCK, PIXEL_BLOCK, Phase};
use crate::isa::dispatch;
use crate::tile::{self, K_RUN, MAX_TILE_ELEMS, PackLanes, with_tile};
use pulp::Simd;
use std::ops::Range;

/// Maximum length of weights, in words, that are close enough to be re-read for every panel of pixels.
const L2_ELEMS: usize = 96 << 10;

/// Pixels of a phase, and where their results go.
#[derive(Clone, Copy)]
struct Block<'a> {
    phase: &'a Phase,
    pixels: &'a [Pixel],
    to: &'a Target,
}

/// The part of the output to compute: pixels from `first` on, the columns of `panels`, `width` in all.
struct Target {
    first: usize,
    panels: Range<usize>,
    width: usize,
}

impl ImplicitGemm {
    /// Computes the output pixels `first ..` that fit into `out`, from the entire input.
    ///
    /// `out` is any run of pixels of the output, `scratch` has length [`ImplicitGemm::scratch_len`].
    pub fn run(&self, operands: Operands<'_>, first: usize, out: &mut [f32], scratch: &mut [f32]) {
        self.run_part(operands, first, 0..self.panel_count(), out, scratch);
    }

    /// Computes the columns of panels `panels` for all output pixels, `[pixels][columns]`; otherwise like
    /// [`ImplicitGemm::run`].
    pub fn run_panels(
        &self,
        operands: Operands<'_>,
        panels: Range<usize>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(out.len(), self.output_len() / self.cout * self.columns(panels.clone()).len());
        self.run_part(operands, 0, panels, out, scratch);
    }

    /// Computes the pixels `first ..` that fit into `out`, in the columns of `panels`.
    fn run_part(
        &self,
        operands: Operands<'_>,
        first: usize,
        panels: Range<usize>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(operands.input.len(), self.n * self.from.0 * self.from.1 * self.cin);
        assert_eq!(operands.packed.len(), self.packed_len);
        let width = self.columns(panels.clone()).len();
        assert_eq!(out.len() % width, 0);
        let pixels = out.len() / width;
        let to = &Target { first, panels, width };
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
                    self.block(Block { phase, pixels: &block, to }, operands, out, scratch);
                    filled = 0;
                }
            }
            if filled > 0 {
                self.block(Block { phase, pixels: &block[..filled], to }, operands, out, scratch);
            }
        }
    }

    fn block(&self, block: Block<'_>, operands: Operands<'_>, out: &mut [f32], scratch: &mut [f32]) {
        dispatch!(self.isa, self.packing, s, dot => self.block_generic(s, dot, block, operands, out, scratch))
    }

    #[inline(always)]
    fn block_generic<S: Simd>(
        &self,
        s: S,
        dot: impl PackLanes,
        block: Block<'_>,
        Operands { input, packed, epilogue }: Operands<'_>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let Block { phase, pixels, to } = block;
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
                self.gather(s, dot, Block { pixels, ..block }, input, k0..k0 + k, panel);
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

    /// Packs the inputs of the words `words` of k of up to `mr` pixels into a blocked A panel.
    #[inline(always)]
    fn gather<S: Simd>(
        &self,
        s: S,
        dot: impl PackLanes,
        Block { phase, pixels, .. }: Block<'_>,
        input: &[f32],
        words: Range<usize>,
        panel: &mut [f32],
    ) {
        let (mr, (h, w), cin) = (self.tile.mr, self.from, self.cin);
        let per_word = self.packing.elems_per_word();
        let (k0, k) = (words.start * per_word, words.len() * per_word);
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

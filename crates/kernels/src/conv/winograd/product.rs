//! Forward pass and data gradient.

use super::super::{ConvShape, Epilogue, Factors};
use super::{APART, BLOCK, D, M, POINTS, Tiles, fits, load, pays, rows_of_block, store, transform, words_of};
use crate::bf16::Words;
use crate::isa::{Isa, dispatch};
use crate::tile::{self, K_RUN, Product, TileShape, with_tile};
use pulp::Simd;
use std::ops::Range;

/// Tiles of a block of many channels, if there are as many.
const FEWEST: usize = 96;
/// Tiles beside which making U does not count.
const MANY_TILES: usize = 1024;
/// Most numbers of U that are made of weights that do not change, each four times: sampling should take little memory.
const MOST_KEPT: usize = 8 << 20;
/// Pictures of a batch, as far as the choice of the way to compute goes where weights do not change.
const NOMINAL_BATCH: usize = 16;
/// Numbers of U that are made at a time where one block of tiles is all there is.
const GROUP: usize = 4 << 20;

/// A 3x3 convolution of stride 1, or its data gradient, prepared for one instruction set.
#[derive(Clone, Debug)]
pub struct Winograd {
    isa: Isa,
    tile: TileShape,
    words: Words,
    shape: ConvShape,
    /// Data gradient: input and output, `cin` and `cout` have changed places, the weights are turned round.
    transposed: bool,
    tiles: Tiles,
    cin: usize,
    cout: usize,
    /// Words of `cin` numbers, rounded up to [`K_RUN`].
    k: usize,
    /// Rows of tiles of a block.
    block_rows: usize,
    /// Panels of columns of a group.
    group: usize,
    /// Whether weights do not change from pass to pass.
    fixed_weights: bool,
}

impl Winograd {
    /// The convolution `y = x * w`, if it is of this kind.
    pub fn forward(isa: Isa, factors: Factors, shape: ConvShape) -> Option<Self> {
        let tiles = Tiles::new(shape.n, shape.input, shape.output, shape.pad);
        fits(&shape).then(|| Self::new(isa, factors, shape, false, tiles, shape.cin, shape.cout))
    }

    /// The data gradient `dx` from `dy`, if the convolution is of this kind.
    pub fn data_grad(isa: Isa, factors: Factors, shape: ConvShape) -> Option<Self> {
        fits(&shape).then(|| {
            let pad = (2 - shape.pad.0, 2 - shape.pad.1);
            let tiles = Tiles::new(shape.n, shape.output, shape.input, pad);
            Self::new(isa, factors, shape, true, tiles, shape.cout, shape.cin)
        })
    }

    fn new(
        isa: Isa,
        factors: Factors,
        shape: ConvShape,
        transposed: bool,
        tiles: Tiles,
        cin: usize,
        cout: usize,
    ) -> Self {
        let tile = TileShape::pick(isa.lanes(), cout);
        let nr = tile.nv * isa.lanes();
        let words = Words::of(isa, factors);
        let numbers = words.numbers() * isa.lanes();
        let k = (cin.div_ceil(numbers) * isa.lanes()).next_multiple_of(K_RUN);
        let panels = cout.div_ceil(nr);
        let wanted = (BLOCK / (POINTS * (k + panels * nr))).max(FEWEST);
        let block_rows = rows_of_block(&tiles, wanted, tile.mr);
        let group = match block_rows == tiles.rows() {
            true => (GROUP / (POINTS * k * nr)).clamp(1, panels),
            false => panels,
        };
        Self {
            isa,
            tile,
            words,
            shape,
            transposed,
            tiles,
            cin,
            cout,
            k,
            block_rows,
            group,
            fixed_weights: false,
        }
    }

    /// With blocks of `rows` rows of tiles, and groups of `panels` panels if one block is all; for tests, which would
    /// need large pictures otherwise.
    pub fn in_blocks(mut self, rows: usize, panels: usize) -> Self {
        self.block_rows = rows.clamp(1, self.tiles.rows());
        self.group = match self.block_rows == self.tiles.rows() {
            true => panels.clamp(1, self.panels()),
            false => self.panels(),
        };
        self
    }

    /// For weights that do not change from pass to pass: U is made once and kept, where making it would be a good part of
    /// a pass (it has four times as many numbers as the weights).
    pub fn with_fixed_weights(self) -> Self {
        let of = Self { fixed_weights: true, ..self };
        let group = if of.keeps_weights() { of.panels() } else { of.group };
        Self { group, ..of }
    }

    /// Whether U is to be kept.
    pub fn keeps_weights(&self) -> bool {
        self.fixed_weights && self.tiles.count() < MANY_TILES
    }

    /// Whether this is expected to take less time than the plain way with such factors. With fixed weights, when pictures
    /// are drawn, the answer is the same for every size of a batch: a picture must not depend on its neighbours.
    pub fn pays(&self, factors: Factors) -> bool {
        let tiles = match self.fixed_weights {
            true => Tiles { n: NOMINAL_BATCH, ..self.tiles },
            false => self.tiles,
        };
        let small = !self.fixed_weights || self.panels() * self.panel_len() <= MOST_KEPT;
        small
            && pays(
                [Words::of(self.isa, factors), self.words],
                self.fixed_weights,
                &tiles,
                self.cin,
                self.cout,
            )
    }

    fn nr(&self) -> usize {
        self.tile.nv * self.isa.lanes()
    }

    /// Panels of columns of the weights.
    pub fn panels(&self) -> usize {
        self.cout.div_ceil(self.nr())
    }

    /// Groups of panels that are worked on one after the other; more than one only if there is one block.
    pub fn groups(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (panels, group) = (self.panels(), self.group);
        (0..panels).step_by(group).map(move |first| first..panels.min(first + group))
    }

    /// Blocks of rows of tiles.
    pub fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, block) = (self.tiles.rows(), self.block_rows);
        (0..rows).step_by(block).map(move |first| first..rows.min(first + block))
    }

    /// Numbers of one panel of U.
    pub fn panel_len(&self) -> usize {
        POINTS * self.packed_point()
    }

    fn packed_point(&self) -> usize {
        self.k * self.nr() + APART
    }

    /// Numbers of U of a group.
    pub fn packed_len(&self) -> usize {
        self.group * self.panel_len()
    }

    fn point_len(&self) -> usize {
        self.k * self.tile.mr + APART
    }

    /// Numbers of V of one group of tiles, of which a block has [`Winograd::value_groups`].
    pub fn values_len(&self) -> usize {
        POINTS * self.point_len()
    }

    /// Groups of tiles of a block of `rows` rows.
    pub fn value_groups(&self, rows: usize) -> usize {
        (rows * self.tiles.grid.1).div_ceil(self.tile.mr)
    }

    /// Numbers of M at one point, for a block of `rows` rows and `panels` panels.
    pub fn products_len(&self, rows: usize, panels: usize) -> usize {
        panels * self.value_groups(rows) * self.tile.mr * self.nr() + APART
    }

    /// Points.
    pub fn points(&self) -> usize {
        POINTS
    }

    /// Numbers of shared scratch memory: U of a group, V and M of a block.
    pub fn shared_len(&self) -> [usize; 3] {
        [
            self.packed_len(),
            self.value_groups(self.block_rows) * self.values_len(),
            POINTS * self.products_len(self.block_rows, self.group),
        ]
    }

    /// Numbers of output that a row of tiles makes.
    pub fn row_len(&self, row: usize) -> usize {
        self.tiles.pixel_rows(row) * self.tiles.to.1 * self.cout
    }

    /// Numbers of the output, `[n, h, w, cout]`.
    pub fn output_len(&self) -> usize {
        self.tiles.n * self.tiles.to.0 * self.tiles.to.1 * self.cout
    }

    /// U of panel `panel`, `[points][k][nr]`, from the weights `[3, 3, shape.cin, shape.cout]`.
    pub fn pack_panel(&self, panel: usize, weights: &[f32], out: &mut [f32]) {
        assert_eq!(weights.len(), self.shape.weights());
        assert_eq!(out.len(), self.panel_len());
        dispatch!(self.isa, self.words, s, product => self.pack_generic(s, product, panel, weights, out))
    }

    #[inline(always)]
    fn pack_generic<S: Simd, P: Product>(
        &self,
        s: S,
        product: P,
        panel: usize,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let nr = self.nr();
        for v in 0..self.tile.nv {
            let column = panel * nr + v * S::F32_LANES;
            for word in 0..self.k {
                // The channels of a word are a vector apart.
                let channel = word / S::F32_LANES * (P::PER_WORD * S::F32_LANES) + word % S::F32_LANES;
                let u = self.weights_at_points(s, channel, column, weights);
                let u = words_of(
                    s,
                    product,
                    self.words,
                    u,
                    #[inline(always)]
                    || self.weights_at_points(s, channel + S::F32_LANES, column, weights),
                );
                for i in 0..D {
                    for j in 0..D {
                        let at = (i * D + j) * self.packed_point() + word * nr + v * S::F32_LANES;
                        store(s, &mut out[at..at + S::F32_LANES], u[i][j]);
                    }
                }
            }
        }
    }

    /// `G g G^T` of input channel `ci` for a vector of output channels; zero where there are no such channels.
    #[inline(always)]
    fn weights_at_points<S: Simd>(
        &self,
        s: S,
        ci: usize,
        column: usize,
        weights: &[f32],
    ) -> [[S::f32s; D]; D] {
        let mut g = [[s.splat_f32s(0.0); 3]; 3];
        let width = S::F32_LANES.min(self.cout.saturating_sub(column));
        if ci >= self.cin || width == 0 {
            return [[s.splat_f32s(0.0); D]; D];
        }
        for i in 0..3 {
            for j in 0..3 {
                let matrix = match self.transposed {
                    false => (i * 3 + j) * self.cin * self.cout,
                    true => ((2 - i) * 3 + 2 - j) * self.cin * self.cout,
                };
                g[i][j] = match self.transposed {
                    false => load(s, &weights[matrix + ci * self.cout + column..][..width]),
                    true => {
                        let mut lanes = [0.0; 16];
                        let from = weights[matrix + column * self.cin + ci..].iter().step_by(self.cin);
                        for (to, w) in lanes.iter_mut().zip(from).take(width) {
                            *to = *w;
                        }
                        load(s, &lanes[..S::F32_LANES])
                    }
                };
            }
        }
        transform::weights(s, g)
    }

    /// V of the group of tiles `group` of a block that begins at tile row `first_row`: `[points][k / 16][mr][16]`.
    pub fn values(&self, first_row: usize, group: usize, input: &[f32], out: &mut [f32]) {
        let (h, w) = self.tiles.from;
        assert_eq!(input.len(), self.tiles.n * h * w * self.cin);
        assert_eq!(out.len(), self.values_len());
        dispatch!(self.isa, self.words, s, product => self.values_generic(s, product, first_row, group, input, out))
    }

    #[inline(always)]
    fn values_generic<S: Simd, P: Product>(
        &self,
        s: S,
        product: P,
        first_row: usize,
        group: usize,
        input: &[f32],
        out: &mut [f32],
    ) {
        let mr = self.tile.mr;
        let first = first_row * self.tiles.grid.1 + group * mr;
        for r in 0..mr {
            let tile = self.tiles.get(first + r);
            for word in (0..self.k).step_by(S::F32_LANES) {
                // Of which channels a word is made is nobody's business, as long as it is the same in U.
                let channel = P::PER_WORD * word;
                let v = self.tiles.values(s, tile, input, self.cin, channel);
                let v = words_of(
                    s,
                    product,
                    self.words,
                    v,
                    #[inline(always)]
                    || self.tiles.values(s, tile, input, self.cin, channel + S::F32_LANES),
                );
                let at = (word / K_RUN * mr + r) * K_RUN + word % K_RUN;
                for i in 0..D {
                    for j in 0..D {
                        let at = at + (i * D + j) * self.point_len();
                        store(s, &mut out[at..at + S::F32_LANES], v[i][j]);
                    }
                }
            }
        }
    }

    /// M at one point, `[panels][tiles][nr]`, for the `panels` panels that `packed` holds.
    pub fn multiply(&self, point: usize, panels: usize, values: &[f32], packed: &[f32], out: &mut [f32]) {
        dispatch!(self.isa, self.words, s, product => self.multiply_generic(
            s, product, point, panels, values, packed, out
        ))
    }

    #[inline(always)]
    fn multiply_generic<S: Simd>(
        &self,
        s: S,
        product: impl Product,
        point: usize,
        panels: usize,
        values: &[f32],
        packed: &[f32],
        out: &mut [f32],
    ) {
        let nr = self.nr();
        let len = values.len() / self.values_len() * self.tile.mr * nr;
        for (j, out) in out.chunks_exact_mut(len).take(panels).enumerate() {
            let b = &packed[(j * POINTS + point) * self.packed_point()..][..self.k * nr];
            let b = S::as_simd_f32s(b).0;
            with_tile!(self.tile, point_panels::<S>(s, self, product, point, values, b, out));
        }
    }

    /// The outputs of a row of tiles, in the columns of the panels `panels`, from M of a block that begins at tile row
    /// `first_row`.
    pub fn outputs(
        &self,
        first_row: usize,
        row: usize,
        panels: Range<usize>,
        products: &[f32],
        epilogue: Epilogue<'_>,
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), self.row_len(row));
        dispatch!(self.isa, s => self.outputs_generic(s, first_row, row, panels, products, epilogue, out))
    }

    #[inline(always)]
    fn outputs_generic<S: Simd>(
        &self,
        s: S,
        first_row: usize,
        row: usize,
        panels: Range<usize>,
        products: &[f32],
        epilogue: Epilogue<'_>,
        out: &mut [f32],
    ) {
        let (nr, width, cout) = (self.nr(), self.tiles.to.1, self.cout);
        let point_len = products.len() / POINTS;
        let panel_len = (point_len - APART) / panels.len();
        let first_pixel = (self.tiles.tile(row * self.tiles.grid.1).picture * self.tiles.to.0
            + row % self.tiles.grid.0 * M)
            * width;
        for column in 0..self.tiles.grid.1 {
            let local = (row - first_row) * self.tiles.grid.1 + column;
            let tile = self.tiles.tile(row * self.tiles.grid.1 + column);
            for c in (panels.start * nr..cout.min(panels.end * nr)).step_by(S::F32_LANES) {
                let lanes = S::F32_LANES.min(cout - c);
                let inside = c - panels.start * nr;
                let at = inside / nr * panel_len + local * nr + inside % nr;
                let mut m = [[s.splat_f32s(0.0); D]; D];
                for i in 0..D {
                    for j in 0..D {
                        let at = (i * D + j) * point_len + at;
                        m[i][j] = load(s, &products[at..at + S::F32_LANES]);
                    }
                }
                let mut y = transform::output(s, m);
                let mut bias = s.splat_f32s(0.0);
                if let Some(b) = epilogue.bias {
                    bias = load(s, &b[c..c + lanes]);
                }
                if let Some(b) = epilogue.picture_bias {
                    bias = s.add_f32s(bias, load(s, &b[tile.picture * cout + c..][..lanes]));
                }
                for i in 0..M {
                    for j in 0..M {
                        if tile.y + i >= self.tiles.to.0 || tile.x + j >= width {
                            continue;
                        }
                        let pixel = i * width + tile.x + j;
                        y[i][j] = s.add_f32s(y[i][j], bias);
                        if let Some(r) = epilogue.residual {
                            let r = load(s, &r[(first_pixel + pixel) * cout + c..][..lanes]);
                            y[i][j] = s.add_f32s(y[i][j], r);
                        }
                        store(s, &mut out[pixel * cout + c..][..lanes], y[i][j]);
                    }
                }
            }
        }
    }
}

/// All groups of tiles at one point against one panel of weights.
#[inline(always)]
fn point_panels<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    of: &Winograd,
    product: impl Product,
    point: usize,
    values: &[f32],
    b: &[S::f32s],
    out: &mut [f32],
) {
    let nr = NV * S::F32_LANES;
    for (values, out) in values.chunks_exact(of.values_len()).zip(out.chunks_exact_mut(MR * nr)) {
        let a = &values[point * of.point_len()..][..of.k * MR];
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::blocked(s, product, a, b, &mut acc);
        for (acc, row) in acc.iter().zip(out.chunks_exact_mut(nr)) {
            tile::store_row(s, acc, row, false);
        }
    }
}

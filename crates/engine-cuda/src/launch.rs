//! Kernel launches, and weights to be repacked: on tensors of a node (`lower`), or at byte offsets once a plan is laid out.

/// A kernel argument. Addresses are byte offsets into the GPU's single allocation once a plan is laid out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg<Addr> {
    /// A pointer.
    At(Addr),
    /// An `int`.
    Int(i32),
    /// An `unsigned int`.
    Uint(u32),
    /// A `float`.
    Float(f32),
    /// A `double`.
    Double(f64),
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch<Addr> {
    /// Kernel name.
    pub kernel: &'static str,
    /// Grid dimensions, in blocks.
    pub grid: [u32; 3],
    /// Block dimensions, in threads.
    pub block: [u32; 3],
    /// Arguments, in the kernel's order.
    pub args: Vec<Arg<Addr>>,
}

impl<P: Copy> Launch<P> {
    /// Maps every address.
    pub fn map_addrs<Q>(&self, f: impl Fn(P) -> Q) -> Launch<Q> {
        let args = self.args.iter().map(|&arg| match arg {
            Arg::At(p) => Arg::At(f(p)),
            Arg::Int(v) => Arg::Int(v),
            Arg::Uint(v) => Arg::Uint(v),
            Arg::Float(v) => Arg::Float(v),
            Arg::Double(v) => Arg::Double(v),
        });
        Launch { kernel: self.kernel, grid: self.grid, block: self.block, args: args.collect() }
    }
}

/// Weights `[taps, c, n]` (`[taps, n, c]` if `transposed`) that are repacked as rows `[n, taps, c]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightRepack<Addr> {
    /// The weights.
    pub from: Addr,
    /// The repacked copy.
    pub to: Addr,
    /// Kernel taps.
    pub taps: usize,
    /// Elements of a tap in a row.
    pub c: usize,
    /// Rows.
    pub n: usize,
    /// Whether `n` comes before `c` in the weights.
    pub transposed: bool,
}

impl<P: Copy> WeightRepack<P> {
    /// Maps every address.
    pub fn map_addrs<Q>(&self, f: impl Fn(P) -> Q) -> WeightRepack<Q> {
        let Self { from, to, taps, c, n, transposed } = *self;
        WeightRepack { from: f(from), to: f(to), taps, c, n, transposed }
    }
}

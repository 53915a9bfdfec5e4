//! Autotuning: whether a node uses our kernels or a library operation with the kernels around it.

use crate::gpu::Gpu;
use crate::launch::{Launch, WeightRepack};
use crate::library::{Algorithm, Alternative, Call, Libraries};
use ddpm_engine::Result;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A library is used only if it takes less than this share of our kernels' time, so that timing noise does not decide between
/// equals.
const SPEEDUP_THRESHOLD: f64 = 0.97;

/// Index of a library alternative, and its algorithm.
pub type Candidate = (usize, Algorithm);

/// Decisions by GPU and node description (`None`: our kernels): a training builds several plans with the same layers.
static CACHE: Mutex<Option<HashMap<String, Option<Candidate>>>> = Mutex::new(None);

/// The candidate implementations of a node.
#[derive(Debug)]
pub struct Candidates<Addr> {
    /// Launches of our kernels.
    pub launches: Vec<Launch<Addr>>,
    /// The weights they need repacked.
    pub repacks: Vec<WeightRepack<Addr>>,
    /// Implementations that use a library.
    pub alternatives: Vec<Alternative<Addr>>,
}

impl<P: Copy> Candidates<P> {
    /// Maps every address.
    pub fn map_addrs<Q>(&self, f: impl Fn(P) -> Q + Copy) -> Candidates<Q> {
        Candidates {
            launches: self.launches.iter().map(|launch| launch.map_addrs(f)).collect(),
            repacks: self.repacks.iter().map(|repacks| repacks.map_addrs(f)).collect(),
            alternatives: self.alternatives.iter().map(|a| a.map_addrs(f)).collect(),
        }
    }

    /// All kernels of all candidates.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        let of_repacks = self.repacks.iter().chain(self.alternatives.iter().flat_map(|a| &a.repacks));
        let after = self.alternatives.iter().flat_map(|a| &a.after);
        self.launches
            .iter()
            .chain(after)
            .map(|launch| launch.kernel)
            .chain(of_repacks.map(|_| "repack_weights"))
    }

    /// The weights that a candidate needs repacked.
    pub fn repacks(&self, candidate: Option<Candidate>) -> &[WeightRepack<P>] {
        candidate.map_or(&self.repacks, |(i, _)| &self.alternatives[i].repacks)
    }

    /// The calls of a candidate.
    pub fn calls(&self, candidate: Option<Candidate>) -> Vec<Call<P>> {
        match candidate {
            None => self.launches.iter().cloned().map(Call::from).collect(),
            Some((i, algorithm)) => self.alternatives[i].calls(algorithm),
        }
    }
}

impl Candidates<usize> {
    /// Chooses a candidate; `None` is our kernels.
    ///
    /// # Errors
    /// If our kernels cannot be timed; a library that fails is not chosen.
    pub fn choose<G: Gpu>(&self, gpu: &mut G, libraries: Libraries) -> Result<Option<Candidate>> {
        match libraries {
            _ if self.alternatives.is_empty() => Ok(None),
            Libraries::Never => Ok(None),
            Libraries::Forced(number) => {
                let all = self.library_candidates(gpu);
                let candidate = (!all.is_empty()).then(|| all[number % all.len()]);
                candidate.map_or(Ok(()), |_| self.run(gpu, candidate))?;
                Ok(candidate)
            }
            Libraries::Timed => {
                // Addresses do not matter: all tensors have the same alignment.
                let key = format!("{} {:?}", gpu.describe(), self.map_addrs(|_| ()));
                let cache = || CACHE.lock().unwrap_or_else(PoisonError::into_inner);
                let known = cache().as_ref().and_then(|all| all.get(&key).copied());
                if let Some(candidate) = known
                    && self.is_usable(gpu, candidate)
                {
                    return Ok(candidate);
                }
                let candidate = self.fastest(gpu)?;
                cache().get_or_insert_with(HashMap::new).insert(key, candidate);
                Ok(candidate)
            }
        }
    }

    /// Runs the node once on arbitrary data, so that libraries load lazily what they could not load during capture.
    fn run<G: Gpu>(&self, gpu: &G, candidate: Option<Candidate>) -> Result<()> {
        self.calls(candidate).iter().try_for_each(|call| gpu.call(call))
    }

    /// Whether a cached decision applies to this GPU, whose libraries are not initialised yet.
    fn is_usable<G: Gpu>(&self, gpu: &mut G, candidate: Option<Candidate>) -> bool {
        let Some((i, algorithm)) = candidate else { return true };
        let offered = gpu.algorithms(&self.alternatives[i].op);
        offered.contains(&algorithm) && self.run(gpu, candidate).is_ok()
    }

    /// All library candidates.
    fn library_candidates<G: Gpu>(&self, gpu: &mut G) -> Vec<Candidate> {
        let mut all = Vec::new();
        for (i, alternative) in self.alternatives.iter().enumerate() {
            all.extend(gpu.algorithms(&alternative.op).into_iter().map(|algorithm| (i, algorithm)));
        }
        all
    }

    /// The fastest candidate on arbitrary data. Weight repacking is not timed, as one launch does it for all nodes.
    fn fastest<G: Gpu>(&self, gpu: &mut G) -> Result<Option<Candidate>> {
        let all = self.library_candidates(gpu);
        if all.is_empty() {
            return Ok(None);
        }
        let mut best = (None, gpu.time(&self.calls(None))?.mul_f64(SPEEDUP_THRESHOLD));
        for candidate in all {
            if let Ok(time) = gpu.time(&self.calls(Some(candidate)))
                && time < best.1
            {
                best = (Some(candidate), time);
            }
        }
        // A failed call may have left the GPU unusable, which shows here.
        gpu.finish()?;
        Ok(best.0)
    }
}

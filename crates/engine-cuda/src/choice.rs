//! Which of a node's ways is taken: our kernels, or a library's product with what stands around it.

use crate::gpu::{Gpu, Launch};
use crate::library::{Algorithm, Alternative, Call, Libraries};
use crate::translate::Rows;
use ddpm_engine::Result;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A library is taken if it needs less than this share of our kernels' time: what is the same but for the clock's noise stays
/// the same.
const FASTER: f64 = 0.97;

/// An alternative's number, and its algorithm.
pub type Way = (usize, Algorithm);

/// What was taken, by GPU and description (`None`: our kernels): a training makes several plans, with the same layers.
static TAKEN: Mutex<Option<HashMap<String, Option<Way>>>> = Mutex::new(None);

/// All ways to make a node.
#[derive(Debug)]
pub struct Ways<Place> {
    /// Our kernels' calls.
    pub launches: Vec<Launch<Place>>,
    /// What they keep of weights.
    pub rows: Vec<Rows<Place>>,
    /// Libraries' ways.
    pub alternatives: Vec<Alternative<Place>>,
}

impl<P: Copy> Ways<P> {
    /// The same with every place replaced.
    pub fn placed<Q>(&self, place: impl Fn(P) -> Q + Copy) -> Ways<Q> {
        Ways {
            launches: self.launches.iter().map(|launch| launch.placed(place)).collect(),
            rows: self.rows.iter().map(|rows| rows.placed(place)).collect(),
            alternatives: self.alternatives.iter().map(|a| a.placed(place)).collect(),
        }
    }

    /// Every kernel of every way.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        let of_rows = self.rows.iter().chain(self.alternatives.iter().flat_map(|a| &a.rows));
        let others = self.alternatives.iter().flat_map(|a| &a.after);
        self.launches.iter().chain(others).map(|launch| launch.kernel).chain(of_rows.map(|_| "weight_rows"))
    }

    /// What a way keeps of weights.
    pub fn rows(&self, way: Option<Way>) -> &[Rows<P>] {
        way.map_or(&self.rows, |(i, _)| &self.alternatives[i].rows)
    }

    /// The calls of a way.
    pub fn calls(&self, way: Option<Way>) -> Vec<Call<P>> {
        match way {
            None => self.launches.iter().cloned().map(Call::from).collect(),
            Some((i, algorithm)) => self.alternatives[i].calls(algorithm),
        }
    }
}

impl Ways<usize> {
    /// Which way to take.
    ///
    /// # Errors
    /// That our kernels cannot be timed; a library that cannot is not taken.
    pub fn choose<G: Gpu>(&self, gpu: &mut G, libraries: Libraries) -> Result<Option<Way>> {
        match libraries {
            _ if self.alternatives.is_empty() => Ok(None),
            Libraries::Never => Ok(None),
            Libraries::Forced(number) => {
                let all = self.others(gpu);
                let way = (!all.is_empty()).then(|| all[number % all.len()]);
                way.map_or(Ok(()), |_| self.run(gpu, way))?;
                Ok(way)
            }
            Libraries::Timed => {
                // Places are no matter: all tensors are aligned alike.
                let key = format!("{} {:?}", gpu.describe(), self.placed(|_| ()));
                let taken = || TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
                let known = taken().as_ref().and_then(|all| all.get(&key).copied());
                if let Some(way) = known
                    && self.can_take(gpu, way)
                {
                    return Ok(way);
                }
                let way = self.fastest(gpu)?;
                taken().get_or_insert_with(HashMap::new).insert(key, way);
                Ok(way)
            }
        }
    }

    /// Makes the node once, with whatever numbers are in memory: libraries load then what they could not within a graph.
    fn run<G: Gpu>(&self, gpu: &G, way: Option<Way>) -> Result<()> {
        self.calls(way).iter().try_for_each(|call| gpu.call(call))
    }

    /// Whether what was taken for an earlier plan can be taken for this one, whose GPU has begun no library yet.
    fn can_take<G: Gpu>(&self, gpu: &mut G, way: Option<Way>) -> bool {
        let Some((i, algorithm)) = way else { return true };
        let offered = gpu.algorithms(&self.alternatives[i].product);
        offered.contains(&algorithm) && self.run(gpu, way).is_ok()
    }

    /// The ways by libraries.
    fn others<G: Gpu>(&self, gpu: &mut G) -> Vec<Way> {
        let mut all = Vec::new();
        for (i, alternative) in self.alternatives.iter().enumerate() {
            all.extend(gpu.algorithms(&alternative.product).into_iter().map(|algorithm| (i, algorithm)));
        }
        all
    }

    /// By the clock, with whatever numbers are in memory. What is kept of weights is made for all nodes at once, and not
    /// reckoned.
    fn fastest<G: Gpu>(&self, gpu: &mut G) -> Result<Option<Way>> {
        let others = self.others(gpu);
        if others.is_empty() {
            return Ok(None);
        }
        let mut best = (None, gpu.time(&self.calls(None))?.mul_f64(FASTER));
        for way in others {
            if let Ok(time) = gpu.time(&self.calls(Some(way)))
                && time < best.1
            {
                best = (Some(way), time);
            }
        }
        // A call that failed may have left the GPU unusable, which then is told here.
        gpu.finish()?;
        Ok(best.0)
    }
}

"""The project's random draws, in numpy: Philox 4x32-10 with counter (block, index, step, purpose).

Lets a PyTorch reference run see the very batches, timesteps and noise that `ddpm train` draws for a seed.
The Rust side is `crates/rng/src/lib.rs`; purposes must agree with `Purpose` there.
"""
import numpy as np

NOISE, TIMESTEP, SHUFFLE, TEST = 1, 2, 3, 100
M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)


def philox(seed, block, index, step, purpose):
    """Four u32 for each counter; the arguments broadcast. Returns uint64 values below 2^32, shape (..., 4)."""
    c = [np.asarray(v, dtype=np.uint64) for v in np.broadcast_arrays(block, index, step, purpose)]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        p0, p1 = M0 * c[0], M1 * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & LOW, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & LOW]
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return np.stack(c, axis=-1)


def normals(seed, purpose, step, index, n):
    """`n` standard normals of one item, by Box-Muller on (0, 1) uniforms, in f64 and then rounded to f32."""
    u = (philox(seed, np.arange((n + 3) // 4), index, step, purpose).astype(np.float64) + 0.5) * 2.0 ** -32
    r0, r1 = np.sqrt(-2 * np.log(u[:, 0])), np.sqrt(-2 * np.log(u[:, 2]))
    a0, a1 = 2 * np.pi * u[:, 1], 2 * np.pi * u[:, 3]
    z = np.stack([r0 * np.cos(a0), r0 * np.sin(a0), r1 * np.cos(a1), r1 * np.sin(a1)], axis=-1)
    return z.reshape(-1)[:n].astype(np.float32)


def timestep(seed, step, index, steps):
    """A uniform integer below `steps`."""
    return int(philox(seed, 0, index, step, TIMESTEP)[0] * np.uint64(steps) >> np.uint64(32))


def permutation(seed, epoch, n):
    """The order of the data in an epoch: Fisher-Yates from the end."""
    draws = philox(seed, np.arange((n + 3) // 4), 0, epoch, SHUFFLE).reshape(-1)
    order = np.arange(n)
    for d, i in enumerate(range(n - 1, 0, -1)):
        j = int(draws[d]) * (i + 1) >> 32
        order[i], order[j] = order[j], order[i]
    return order


if __name__ == '__main__':  # the known-answer vectors of Random123 (Salmon et al. 2011)
    assert [hex(v) for v in philox(0, 0, 0, 0, 0)] == ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    f = 0xFFFFFFFF
    assert [hex(v) for v in philox(f << 32 | f, f, f, f, f)] == ['0x408f276d', '0x41c83b0e', '0xa20bc7c6', '0x6d5451fd']
    print('philox: known answers agree')

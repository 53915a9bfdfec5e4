"""The PyTorch references of the project's networks, with the state-dict names and the arithmetic that people know.

    AttentionUnet    ResNet + self-attention blocks, the DDPM-Pytorch tutorial (conv_in, t_proj, downs, mids, ups)
    DoubleConvUnet   double convolutions, GELU, max-pool, bilinear upsampling (conv1, down1, att1, ..., convOut)
    SimpleUnet       convolution, ReLU, BatchNorm (time_mlp, conv0, downs, ups, output)

Constraints on the widths of `AttentionUnet`: `mid[0] == down[-1]`, `mid[-1] == down[-2]`; every width is a multiple of 8 (group norm)
and of `heads`; height and width are multiples of 2 for each True of `resample`. The last up block gives 16 channels.
"""
import math

import torch
from torch import nn


def grow(v):
    return v[:, :, None, None]


def sincos(t, dim):
    """Sinusoidal embedding [B, dim] of timesteps [B], in f32 whatever the network's type: sines, then cosines."""
    freq = 10000 ** (torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    arg = t[:, None].float() / freq
    return torch.cat([arg.sin(), arg.cos()], dim=-1)


def norm_act_conv(cin, cout):
    return nn.Sequential(nn.GroupNorm(8, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))


class ResAttention(nn.Module):
    """`resnets` ResNet blocks, an attention behind each (down, up) or between them (mid)."""

    def __init__(self, cin, cout, temb, heads, resnets, attentions):
        super().__init__()
        ins = [cin] + [cout] * (resnets - 1)
        self.resnet_conv_first = nn.ModuleList(norm_act_conv(c, cout) for c in ins)
        self.t_emb_layers = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(temb, cout)) for _ in ins)
        self.resnet_conv_second = nn.ModuleList(norm_act_conv(cout, cout) for _ in ins)
        self.residual_input_conv = nn.ModuleList(nn.Conv2d(c, cout, 1) for c in ins)
        self.attention_norms = nn.ModuleList(nn.GroupNorm(8, cout) for _ in range(attentions))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(cout, heads, batch_first=True) for _ in range(attentions))
        self.need_weights = True  # the tutorial's call; False takes PyTorch's fused attention

    def res(self, i, x, t):
        h = self.resnet_conv_first[i](x) + grow(self.t_emb_layers[i](t))
        return self.resnet_conv_second[i](h) + self.residual_input_conv[i](x)

    def att(self, i, x):
        b, c, h, w = x.shape
        q = self.attention_norms[i](x.reshape(b, c, h * w)).transpose(1, 2)
        out, _ = self.attentions[i](q, q, q, need_weights=self.need_weights)
        return x + out.transpose(1, 2).reshape(b, c, h, w)


class Down(ResAttention):
    def __init__(self, cin, cout, temb, heads, layers, resample):
        super().__init__(cin, cout, temb, heads, layers, layers)
        self.down_sample_conv = nn.Conv2d(cout, cout, 4, 2, 1) if resample else nn.Identity()

    def forward(self, x, t):
        for i in range(len(self.attentions)):
            x = self.att(i, self.res(i, x, t))
        return self.down_sample_conv(x)


class Mid(ResAttention):
    def __init__(self, cin, cout, temb, heads, layers):
        super().__init__(cin, cout, temb, heads, layers + 1, layers)

    def forward(self, x, t):
        x = self.res(0, x, t)
        for i in range(len(self.attentions)):
            x = self.res(i + 1, self.att(i, x), t)
        return x


class Up(ResAttention):
    def __init__(self, cin, cout, temb, heads, layers, resample):
        super().__init__(cin, cout, temb, heads, layers, layers)
        self.up_sample_conv = nn.ConvTranspose2d(cin // 2, cin // 2, 4, 2, 1) if resample else nn.Identity()

    def forward(self, x, skip, t):
        x = torch.cat([self.up_sample_conv(x), skip], dim=1)
        for i in range(len(self.attentions)):
            x = self.att(i, self.res(i, x, t))
        return x


class AttentionUnet(nn.Module):
    """x [B, channels, H, W], t [B] -> the predicted noise [B, channels, H, W]. `layers` are those of a down, a mid
    and an up block. The defaults are the tutorial's MNIST network, 10,188,081 parameters."""

    def __init__(self, channels=1, down=(32, 64, 128, 256), mid=(256, 256, 128), resample=(True, True, False),
                 temb=128, layers=(2, 2, 2), heads=4):
        super().__init__()
        n = len(down) - 1
        self.temb = temb
        self.t_proj = nn.Sequential(nn.Linear(temb, temb), nn.SiLU(), nn.Linear(temb, temb))
        self.conv_in = nn.Conv2d(channels, down[0], 3, padding=1)
        self.downs = nn.ModuleList(
            Down(down[i], down[i + 1], temb, heads, layers[0], resample[i]) for i in range(n))
        self.mids = nn.ModuleList(Mid(mid[i], mid[i + 1], temb, heads, layers[1]) for i in range(len(mid) - 1))
        self.ups = nn.ModuleList(
            Up(down[i] * 2, down[i - 1] if i else 16, temb, heads, layers[2], resample[i]) for i in reversed(range(n)))
        self.norm_out = nn.GroupNorm(8, 16)
        self.conv_out = nn.Conv2d(16, channels, 3, padding=1)

    def fused_attention(self):
        for m in self.modules():
            if isinstance(m, ResAttention):
                m.need_weights = False
        return self

    def forward(self, x, t):
        t = self.t_proj(sincos(t, self.temb).to(self.conv_in.weight.dtype))
        x = self.conv_in(x)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(x, t)
        for mid in self.mids:
            x = mid(x, t)
        for up in self.ups:
            x = up(x, skips.pop(), t)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


# --- DoubleConvUnet --------------------------------------------------------------------------------------------------

class DoubleConv(nn.Module):
    def __init__(self, cin, cout, mid=None, residual=False):
        super().__init__()
        mid = mid or cout
        self.residual = residual
        self.double_conv = nn.Sequential(
            nn.Conv2d(cin, mid, 3, padding=1, bias=False), nn.GroupNorm(1, mid), nn.GELU(),
            nn.Conv2d(mid, cout, 3, padding=1, bias=False), nn.GroupNorm(1, cout))

    def forward(self, x):
        h = self.double_conv(x)
        return nn.functional.gelu(x + h) if self.residual else h


class DownSampler(nn.Module):
    def __init__(self, cin, cout, temb):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(cin, cin, residual=True), DoubleConv(cin, cout))
        self.pos_embed = nn.Sequential(nn.SiLU(), nn.Linear(temb, cout))

    def forward(self, x, t):
        return self.maxpool_conv(x) + grow(self.pos_embed(t))


class UpSampler(nn.Module):
    def __init__(self, cin, cout, temb):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode='bilinear', align_corners=True)
        self.conv = nn.Sequential(DoubleConv(cin, cin, residual=True), DoubleConv(cin, cout, cin // 2))
        self.pos_embed = nn.Sequential(nn.SiLU(), nn.Linear(temb, cout))

    def forward(self, x, skip, t):
        return self.conv(torch.cat([skip, self.up(x)], dim=1)) + grow(self.pos_embed(t))


class SelfAttention(nn.Module):
    """LayerNorm, 4 heads, residual; then LayerNorm, Linear, GELU, Linear, residual. Dropout 0.2 on the weights."""

    def __init__(self, c, dropout=0.2):
        super().__init__()
        self.mha = nn.MultiheadAttention(c, 4, dropout=dropout, batch_first=True)
        self.ln = nn.LayerNorm([c])
        self.ff_self = nn.Sequential(nn.LayerNorm([c]), nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h * w).transpose(1, 2)
        q = self.ln(x)
        x = self.mha(q, q, q)[0] + x
        x = self.ff_self(x) + x
        return x.transpose(1, 2).reshape(b, c, h, w)


class DoubleConvUnet(nn.Module):
    def __init__(self, channels=3, temb=128, dropout=0.2):
        super().__init__()
        self.temb = temb
        att = lambda c: SelfAttention(c, dropout)
        self.conv1 = DoubleConv(channels, 64)
        self.down1, self.att1 = DownSampler(64, 128, temb), att(128)
        self.down2, self.att2 = DownSampler(128, 256, temb), att(256)
        self.down3, self.att3 = DownSampler(256, 256, temb), att(256)
        self.bottl1, self.bottl2, self.bottl3 = DoubleConv(256, 512), DoubleConv(512, 512), DoubleConv(512, 256)
        self.up1, self.att4 = UpSampler(512, 128, temb), att(128)
        self.up2, self.att5 = UpSampler(256, 64, temb), att(64)
        self.up3, self.att6 = UpSampler(128, 64, temb), att(64)
        self.convOut = nn.Conv2d(64, channels, 1)

    def forward(self, x, t):
        freq = 1.0 / 10000 ** (torch.arange(0, self.temb, 2, device=x.device).float() / self.temb)
        arg = t[:, None].float() * freq
        t = torch.cat([arg.sin(), arg.cos()], dim=-1).to(x.dtype)
        x1 = self.conv1(x)
        x2 = self.att1(self.down1(x1, t))
        x3 = self.att2(self.down2(x2, t))
        x4 = self.att3(self.down3(x3, t))
        x4 = self.bottl3(self.bottl2(self.bottl1(x4)))
        x = self.att4(self.up1(x4, x3, t))
        x = self.att5(self.up2(x, x2, t))
        x = self.att6(self.up3(x, x1, t))
        return self.convOut(x)


# --- SimpleUnet ------------------------------------------------------------------------------------------------------

class SinusoidalPositionEmbeddings(nn.Module):
    """In f64: f32 is off by 3e-5 at t = 999, which this network's ReLUs make 1e-2 of some gradients of."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        half = self.dim // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float64)
        arg = t.double()[:, None] * torch.exp(steps * -(math.log(10000) / (half - 1)))
        return torch.cat([arg.sin(), arg.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, cin, cout, temb, up=False):
        super().__init__()
        self.time_mlp = nn.Linear(temb, cout)
        self.conv1 = nn.Conv2d(2 * cin if up else cin, cout, 3, padding=1)
        self.transform = (nn.ConvTranspose2d if up else nn.Conv2d)(cout, cout, 4, 2, 1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.bnorm1, self.bnorm2 = nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU()

    def forward(self, x, t):
        h = self.bnorm1(self.relu(self.conv1(x))) + grow(self.relu(self.time_mlp(t)))
        return self.transform(self.bnorm2(self.relu(self.conv2(h))))


class SimpleUnet(nn.Module):
    def __init__(self, channels=1, widths=(64, 128, 256, 512, 1024), temb=32):
        super().__init__()
        n, w = len(widths) - 1, widths
        self.time_mlp = nn.Sequential(SinusoidalPositionEmbeddings(temb), nn.Linear(temb, temb), nn.ReLU())
        self.conv0 = nn.Conv2d(channels, w[0], 3, padding=1)
        self.downs = nn.ModuleList(Block(w[i], w[i + 1], temb) for i in range(n))
        self.ups = nn.ModuleList(Block(w[i + 1], w[i], temb, up=True) for i in reversed(range(n)))
        self.output = nn.Conv2d(w[0], channels, 1)

    def forward(self, x, t):
        t = self.time_mlp[0](t).to(x.dtype)
        t = self.time_mlp[1:](t)
        x = self.conv0(x)
        skips = []
        for down in self.downs:
            x = down(x, t)
            skips.append(x)
        for up in self.ups:
            x = up(torch.cat([x, skips.pop()], dim=1), t)
        return self.output(x)

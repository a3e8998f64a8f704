"""The networks, and what all scripts do with them: decoders, parameter groups, save, load, resume.

A Vision Transformer (ViT) cuts an image into square patches, makes a token (a vector) of each, and
lets the tokens look at each other in a stack of blocks.

Shapes in comments: B batch, C bands, H W pixels (rows, columns), P side of a patch, h w grid of
patches (h = H / P), N = h * w patches, D width, R registers, T = 1 + R + N tokens, nh heads,
hd = D / nh, L visible patches, G groups of bands, K classes (in DINOHead: prototypes).
Parameters have the names and shapes of the public MAE and DINOv2 checkpoints, so that weights can
travel (tools/convert_weights.py).
"""
import contextlib
import inspect
import math
import os
import re
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import (FLOORS, IGNORE_INDEX, UserError, blend_weights, cut_positions, kept_meta,
                  one_line, same_bands, standardization, standardize, valid_pixels, window_means)

SIZES = {  # tiny is for laptops; small and base are ViT-S and ViT-B (arXiv 2012.12877, 2010.11929)
    'tiny': dict(embed_dim=128, depth=6, num_heads=4),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
}


# ============ building blocks ============

def patchify(x, patch_size):
    """x (B, C, H, W) -> patches (B, N, P*P*C), row by row; in a patch the band runs fastest."""
    B, C, H, W = x.shape
    P = patch_size
    if H % P or W % P:
        raise UserError(f'an image of {H} x {W} pixels cannot be cut into patches of {P}: pass '
                        f'sides that are multiples of {P}')
    x = x.reshape(B, C, H // P, P, W // P, P)  # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches, patch_size, h, w):
    """patches (B, N, P*P*C) -> x (B, C, h*P, w*P): the inverse of patchify."""
    B, P = len(patches), patch_size
    x = patches.reshape(B, h, w, P, P, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * P, w * P)


def sincos_encoding(values, dim):
    """values (G,), e.g. wavelengths in units of 10 nm -> (1, G, dim): their sines and cosines at
    geometric frequencies (Vaswani et al. 2017)."""
    omega = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.as_tensor(values, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)[None].float()


def sincos_positions(dim, h, w):
    """MAE's fixed table of positions (1, h*w, dim): half the channels code the column, half the
    row."""
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    of_cols = sincos_encoding(cols.flatten(), dim // 2)
    of_rows = sincos_encoding(rows.flatten(), dim // 2)
    return torch.cat([of_cols, of_rows], dim=2)


def interpolate_positions(table, h, w):
    """Positions of a square grid (1, N, D) -> of an h x w grid (1, h*w, D), bicubic."""
    side = math.isqrt(table.shape[1])
    if (h, w) == (side, side):
        return table
    table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(table.float(), size=(h, w), mode='bicubic').flatten(2).transpose(1, 2)


def prepare(network, raw):
    """Raw values (B, C, H, W) or (C, H, W), tensor or array of any number type -> standardised
    (B, C, H, W), float32, on the network's device. NaN and masked values are missing.

    The network is one of load_encoder() or load_segmenter().
    """
    C, nodata, shape = network.meta['num_bands'], network.meta['nodata'], np.shape(raw)
    if len(shape) not in (3, 4) or shape[-3] != C:
        raise UserError(f'prepare: the images have the shape {tuple(shape)}, the network was '
                        f'trained on {C} bands: pass (B, {C}, H, W) or ({C}, H, W)')
    if not isinstance(raw, torch.Tensor):
        stored = np.ma.getdata(raw)
        values = np.ma.array(raw, dtype=np.float32, copy=True, order='C').filled(np.nan)
        if stored.dtype == np.uint8:  # float32 would not tell that here 0 may be a value
            values[~np.broadcast_to(valid_pixels(stored, nodata)[..., None, :, :], shape)] = np.nan
            nodata = None
        raw = torch.from_numpy(values)
    device = next(network.parameters()).device
    mean, matrix = (values.to(device) for values in network.statistics)
    raw = raw.reshape(-1, *raw.shape[-3:]).to(device)
    return standardize(raw, mean, matrix, nodata)


class PatchEmbed(nn.Module):
    """Linear map of each patch to a token; its weight is stored as a strided convolution's."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))  # as a linear layer (MAE)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches):
        """patches (..., P*P*C) of patchify, any selection of them -> tokens (..., D)"""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def heads(self, x):
        """x (B, T, D) -> queries, keys, values (B, nh, T, hd)"""
        B, T, _ = x.shape
        return self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def weights(self, q, k):
        """q, k (B, nh, T, hd) -> softmax(q k' / sqrt(hd)) (B, nh, T, T): how much the token of a
        row takes from each token"""
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)"""
        B, T, D = x.shape
        q, k, v = self.heads(x)
        if x.is_cuda or T > 512:
            x = F.scaled_dot_product_attention(q, k, v)  # weights(q, k) @ v, fused
        else:
            # the same spelled out: on CPUs, for short sequences, 2 to 8 times as fast
            x = self.weights(q, k).to(v.dtype) @ v
        x = x.transpose(1, 2).reshape(B, T, D)
        return self.drop(self.proj(x))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020, arXiv 2002.05202) of the same cost: its hidden width is 2/3 of the
    MLP's, rounded up to a multiple of 8."""

    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.drop(self.w3(F.silu(gate) * value))


class LayerScale(nn.Module):
    """A learned gain per channel on each residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim, init_values):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to what came in."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, ffn='mlp', init_values=0.0, drop_path=0.0,
                 dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = {'mlp': Mlp, 'swiglu': SwiGLU}[ffn](dim, int(dim * mlp_ratio), dropout)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = drop_path

    def attention_branch(self, x):
        return self.ls1(self.attn(self.norm1(x)))

    def mlp_branch(self, x):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, wanted=None):
        """x (B, T, D) -> (B, T, D), or the first `wanted` tokens only: the MLP works on each token
        alone, so the others need none."""
        if self.training and self.drop_path:
            x = drop_path(x, self.attention_branch, self.drop_path)[:, :wanted]
            return drop_path(x, self.mlp_branch, self.drop_path)
        x = (x + self.attention_branch(x))[:, :wanted]
        return x + self.mlp_branch(x)


def drop_path(x, branch, rate):
    """x + branch(x) with stochastic depth (Huang et al. 2016): a random share `rate` of the samples
    skips the branch, and for the others it is scaled up to keep the mean. x (B, T, D)."""
    B = len(x)
    kept = round(B * (1 - rate))
    if not kept or abs(B - kept - B * rate) > B * rate / 3:
        # a batch too small to be divided so: each sample skips by chance
        keep = torch.rand(B, 1, 1, device=x.device) >= rate
        return x + branch(x).masked_fill(~keep, 0) / (1 - rate)
    # the branch runs on the kept samples only, as in DINOv2: less work
    ids = torch.randperm(B, device=x.device)[:kept]
    change = branch(x.index_select(0, ids))
    return x.index_add(0, ids, change.to(x.dtype), alpha=B / kept)


def init_linear(module):
    """Xavier for every linear layer, zero biases (MAE). A LayerNorm starts at 1 and 0 by itself."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ============ Vision Transformer ============

class ViT(nn.Module):
    """Vision Transformer (arXiv 2010.11929) with the options of DINOv2: registers (2309.16588),
    SwiGLU, LayerScale, drop path.

    It takes any height and width that are multiples of `patch_size` (positions are interpolated).
    `fixed_positions` gives MAE's sine-cosine table instead of a learned one; `mask_token` is for
    iBOT's masked patches. Order of tokens: [cls, registers, patches].
    """

    prepare = prepare

    def __init__(self, img_size=64, patch_size=8, in_chans=32, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, ffn='mlp', num_register_tokens=0, init_values=0.0,
                 drop_path_rate=0.0, dropout=0.0, fixed_positions=False, mask_token=False):
        super().__init__()
        if img_size % patch_size:
            raise UserError(f'img_size {img_size} is not a multiple of patch_size {patch_size}: '
                            'change one of the two')
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 + num_register_tokens
        self.block_args = dict(dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, ffn=ffn,
                               init_values=init_values, drop_path=drop_path_rate, dropout=dropout)
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, embed_dim),
                                      requires_grad=not fixed_positions)
        self.register_tokens = self.mask_token = None
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(Block(**self.block_args) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.apply(init_linear)
        nn.init.normal_(self.cls_token, std=0.02)
        if num_register_tokens:
            nn.init.normal_(self.register_tokens, std=0.02)
        if fixed_positions:
            nn.init.zeros_(self.pos_embed)
            self.pos_embed.data[:, 1:] = sincos_positions(embed_dim, grid, grid)
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def add_prefix(self, cls, tokens):
        """cls (1, 1, D), tokens (B, N, D) -> [cls, registers, tokens] (B, T, D)"""
        prefix = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        prefix = [token.expand(len(tokens), -1, -1) for token in prefix]
        return torch.cat([*prefix, tokens], dim=1)

    def embed(self, x, mask=None):
        """x (B, C, H, W), mask (B, N) True = hidden -> tokens (B, T, D) before the first block."""
        B, C, H, W = x.shape
        if C != self.in_chans:
            raise UserError(f'the image has {C} bands, the encoder was built for {self.in_chans}')
        tokens = self.patch_embed(patchify(x, self.patch_size))  # (B, N, D)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        h, w = H // self.patch_size, W // self.patch_size
        tokens = tokens + interpolate_positions(self.pos_embed[:, 1:], h, w)
        return self.add_prefix(self.cls_token + self.pos_embed[:, :1], tokens)  # (B, T, D)

    def forward(self, x, mask=None, wanted=None):
        """x (B, C, H, W) standardised, mask (B, N) or None -> normalised tokens (B, T, D), or the
        first `wanted` of them: 1 is cls alone, and a little less work."""
        x = self.embed(x, mask)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, wanted))

    def to_map(self, tokens, h):
        """tokens (B, T, D) after a block -> the patches', normalised, as a map (B, D, h, w)"""
        patches = self.norm(tokens)[:, self.num_prefix_tokens:]  # (B, N, D)
        return patches.transpose(1, 2).unflatten(2, (h, -1))

    def get_intermediate_layers(self, x, n=4):
        """x (B, C, H, W) -> the maps of the last n blocks, each (B, D, h, w), earliest first."""
        h = x.shape[2] // self.patch_size
        x = self.embed(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                maps.append(self.to_map(x, h))
        return maps


# ============ spatial-spectral Vision Transformer ============

class SpatialSpectralViT(ViT):
    """A ViT with a second stream, whose tokens are groups of neighbouring bands.

    The first stream is the ViT above, with its names of parameters. After each block both streams
    are concatenated and a linear map of that, a 1x1 convolution, is added to each (the
    dissertation's Fig. 3.5 and 3.6, after Chen et al. 2023). There are two designs:

    `fusion='token'`, the dissertation's: a spectral token is the flattened pixel plane of its
    bands, and the convolution mixes tokens. So sizes are fixed: crops of img_size, and of half
    that side, with weights of their own.
    `fusion='channel'`, ours: a spectral token is its bands pooled to a grid of 4 x 4, and the
    convolution mixes channels: those of each token with the mean token of the other stream.
    Any size of image.

    A sine-cosine code of the mean of `wavelengths_nm` (C,), or else of band numbers, places the
    spectral tokens. Their order: [spectral cls, registers (the spatial ones' parameters), groups].
    """

    def __init__(self, *args, spectral_patch_size: int = 2, fusion: str = 'channel',
                 wavelengths_nm: list = None, **kwargs):
        super().__init__(*args, **kwargs)
        D, depth = self.embed_dim, len(self.blocks)
        self.fusion = fusion
        self.spectral_patch_size = spectral_patch_size
        self.num_groups = math.ceil(self.in_chans / spectral_patch_size)
        positions = torch.arange(self.in_chans, dtype=torch.float64)
        if wavelengths_nm is not None:
            positions = torch.tensor(wavelengths_nm, dtype=torch.float64) / 10
        positions = self.fill_last_group(positions[None]).reshape(self.num_groups, -1).mean(1)
        code = sincos_encoding(positions, D)
        self.register_buffer('wavelength_code', code, persistent=False)  # (1, G, D)

        self.spectral_cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.spectral_mask_token = None
        if self.mask_token is not None:
            self.spectral_mask_token = nn.Parameter(torch.zeros(1, D))
        self.spectral_blocks = nn.ModuleList(Block(**self.block_args) for _ in range(depth))
        self.spectral_norm = nn.LayerNorm(D, eps=1e-6)
        self.spectral_pos_embed = None
        if fusion == 'token':
            self.fuse = nn.ModuleDict()
            self.spectral_pos_embed = nn.Parameter(torch.empty(1, 1 + self.num_groups, D))
            nn.init.trunc_normal_(self.spectral_pos_embed, std=0.02)
            self.spectral_embed = self.add_token_fusion('', self.img_size)
            self.spectral_embed_local = self.add_token_fusion('_local', self.img_size // 2)
        else:
            self.spectral_embed = nn.Linear(spectral_patch_size * 4 * 4, D)
            self.fuse = nn.ModuleDict({
                stream: nn.ModuleList(nn.Linear(2 * D, D) for _ in range(depth))
                for stream in ('spatial', 'spectral')})

        self.spectral_blocks.apply(init_linear)
        self.spectral_embed.apply(init_linear)
        nn.init.normal_(self.spectral_cls_token, std=0.02)
        # the streams start apart and learn what to take from each other
        for parameter in self.fuse.parameters():
            nn.init.zeros_(parameter)
        # Fusion is slowed down. AdamW changes each weight by about lr, however small its gradient,
        # and fusion adds nearly the same vector to all tokens, which soon outweighs what tells them
        # apart: the probe fell by 4 points without.
        self.fuse_scale = 0.1

    def fill_last_group(self, x):
        """x (B, C, ...) -> (B, G * bands of a group, ...): the last band is repeated to fill up."""
        missing = self.num_groups * self.spectral_patch_size - self.in_chans
        return torch.cat([x] + [x[:, -1:]] * missing, dim=1) if missing else x

    def add_token_fusion(self, name, side):
        """Make the weights of token fusion for crops of `side` px -> the embedding for them."""
        size = self.spectral_patch_size
        embed = nn.Conv1d(side * side, self.embed_dim, size, stride=size)
        spatial = self.num_prefix_tokens + (side // self.patch_size) ** 2
        spectral = self.num_prefix_tokens + self.num_groups
        for stream, tokens in (('spatial', spatial), ('spectral', spectral)):
            self.fuse[stream + name] = nn.ModuleList(
                nn.Conv1d(spatial + spectral, tokens, 1) for _ in self.blocks)
        return embed

    def is_local(self, x):
        """Is x (B, C, H, W) a crop of half the side? Token fusion has weights of its own for it."""
        H, W = x.shape[2:]
        if H != W or H not in (self.img_size, self.img_size // 2):
            raise UserError(f'an image of {H} x {W} pixels: token fusion has weights for '
                            f'{self.img_size} and {self.img_size // 2} px only: give images of '
                            'one of these (in viz_attention.py by --window), or train with '
                            '--fusion=channel')
        return H != self.img_size

    def embed_spectra(self, x, mask=None):
        """x (B, C, H, W), mask (B, G) True = hidden -> spectral tokens (B, 1 + R + G, D) before the
        first block."""
        if self.fusion == 'token':
            embed = self.spectral_embed_local if self.is_local(x) else self.spectral_embed
            planes = self.fill_last_group(x).flatten(2)  # (B, C, H*W)
            tokens = embed(planes.transpose(1, 2)).transpose(1, 2)
        else:
            pooled = F.adaptive_avg_pool2d(self.fill_last_group(x), 4)
            tokens = self.spectral_embed(pooled.reshape(len(x), self.num_groups, -1))
        if mask is not None:  # tokens (B, G, D)
            hidden = self.spectral_mask_token.to(tokens.dtype)
            tokens = torch.where(mask[..., None], hidden, tokens)
        tokens = tokens + self.wavelength_code
        cls = self.spectral_cls_token
        if self.spectral_pos_embed is not None:
            tokens = tokens + self.spectral_pos_embed[:, 1:]
            cls = cls + self.spectral_pos_embed[:, :1]
        return self.add_prefix(cls, tokens)

    def run_blocks(self, x, mask=None, spectral_mask=None):
        """Yields both streams after each block and its fusion: (B, T, D), (B, 1 + R + G, D)."""
        spatial = self.embed(x, mask)
        spectral = self.embed_spectra(x, spectral_mask)
        local = '_local' if self.fusion == 'token' and self.is_local(x) else ''
        fuse_spatial = self.fuse['spatial' + local]
        fuse_spectral = self.fuse['spectral' + local]
        for i in range(len(self.blocks)):
            spatial = self.blocks[i](spatial)
            spectral = self.spectral_blocks[i](spectral)
            if self.fusion == 'token':
                for_spatial = for_spectral = torch.cat([spatial, spectral], dim=1)
            else:  # twice as wide: beside each token the mean token of the other stream
                spatial_mean = spatial.mean(1, keepdim=True)
                spectral_mean = spectral.mean(1, keepdim=True)
                for_spatial = torch.cat([spatial, spectral_mean.expand_as(spatial)], dim=2)
                for_spectral = torch.cat([spectral, spatial_mean.expand_as(spectral)], dim=2)
            spatial = spatial + self.fuse_scale * fuse_spatial[i](for_spatial)
            spectral = spectral + self.fuse_scale * fuse_spectral[i](for_spectral)
            yield spatial, spectral

    def forward(self, x, mask=None, spectral_mask=None):
        """x (B, C, H, W) standardised, masks (B, N) and (B, G) or None -> normalised tokens of the
        two streams, (B, T, D) and (B, 1 + R + G, D)."""
        for spatial, spectral in self.run_blocks(x, mask, spectral_mask):
            pass
        return self.norm(spatial), self.spectral_norm(spectral)

    def get_intermediate_layers(self, x, n=4):
        """x (B, C, H, W) -> the spatial stream's last n maps (B, D, h, w); what the spectral stream
        found has reached them by fusion."""
        h = x.shape[2] // self.patch_size
        streams = list(self.run_blocks(x))
        return [self.to_map(spatial, h) for spatial, _ in streams[-n:]]


# ============ projection head of DINO and iBOT ============

class DINOHead(nn.Module):
    """Three linear layers, then the cosine to K learned prototypes (DINO, arXiv 2104.14294).

    `last_layer.weight_g`, the lengths of the prototypes, stays at 1 as in DINOv2
    (`norm_last_layer` in DINO): lengths that learn make training unstable.
    """

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        self.last_layer.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last_layer.weight_v, std=0.02)

    def forward(self, x):
        """x (..., D) -> logits (..., K): cosines in -1..1, before any temperature"""
        x = F.normalize(self.mlp(x).float(), dim=-1)  # (..., bottleneck)
        v, g = self.last_layer.weight_v, self.last_layer.weight_g
        prototypes = v * (g / v.norm(dim=-1, keepdim=True).clamp(min=1e-12))  # (K, bottleneck)
        return F.linear(x, prototypes)


# ============ masked autoencoder ============

class MaskedAutoencoder(nn.Module):
    """Masked autoencoder (He et al. 2021, arXiv 2111.06377): the encoder sees the visible patches
    only, a small decoder predicts the pixels of the others.

    `.encoder` is an ordinary ViT that never hears of masks, made of the arguments that are not
    named here. With `freeze_encoder` only the decoder learns.
    """

    def __init__(self, *args, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,
                 norm_pix_loss=False, freeze_encoder=False, dropout=0.0, **kwargs):
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.freeze_encoder = freeze_encoder
        self.encoder = ViT(*args, dropout=dropout, fixed_positions=True, **kwargs)
        patch_size, in_chans = self.encoder.patch_size, self.encoder.in_chans
        grid = self.encoder.img_size // patch_size
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        table = torch.zeros(1, 1 + grid * grid, decoder_embed_dim)
        table[:, 1:] = sincos_positions(decoder_embed_dim, grid, grid)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, dropout=dropout)
            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size ** 2 * in_chans)

        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)
        if freeze_encoder:
            self.encoder.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()  # no dropout
        return self

    def random_masking(self, mask_noise, mask_ratio):
        """mask_noise (B, N): the patches with the smallest values stay visible.

        -> ids_keep (B, L), ids_restore (B, N), mask (B, N) with 1 = hidden
        """
        N = mask_noise.shape[1]
        keep = max(1, round(N * (1 - mask_ratio)))  # round, not int: int(100 * (1 - 0.9)) is 9
        ids_shuffle = mask_noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= keep).float()
        return ids_shuffle[:, :keep], ids_restore, mask

    def forward_encoder(self, patches, ids_keep):
        """patches (B, N, P*P*C), ids_keep (B, L) -> latent (B, 1 + L, D). Only the visible patches
        are embedded."""
        encoder = self.encoder
        x = encoder.patch_embed(gather_tokens(patches, ids_keep))  # (B, L, D)
        positions = encoder.pos_embed[0, 1:].index_select(0, ids_keep.flatten())
        x = x + positions.reshape(*ids_keep.shape, -1)
        cls = encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def forward_decoder(self, latent, ids_restore):
        """latent (B, 1 + L, D), ids_restore (B, N) -> pred (B, N, P*P*C) in image order"""
        x = self.decoder_embed(latent)
        B, N = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(B, N + 1 - x.shape[1], -1)
        patches = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, patches, pred, mask):
        """Mean squared error over the hidden patches; with norm_pix_loss each target patch has
        mean 0 and variance 1."""
        target = patches.float()
        if self.norm_pix_loss:
            variance = target.var(-1, keepdim=True)
            target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
        error = (pred.float() - target).square().mean(-1)  # (B, N)
        return (error * mask).sum() / mask.sum()

    def forward(self, x, mask_ratio=0.75, mask_noise=None):
        """x (B, C, H, W) standardised, mask_noise (B, N) or None -> loss, pred (B, N, P*P*C), mask
        (B, N) with 1 = hidden."""
        patches = patchify(x, self.encoder.patch_size)
        expected = self.decoder_pos_embed.shape[1] - 1
        if patches.shape[1] != expected:
            raise UserError(f'the image has {patches.shape[1]} patches, this autoencoder was built '
                            f'for {expected}: crop to img_size {self.encoder.img_size}')
        if mask_noise is None:
            mask_noise = torch.rand(patches.shape[:2], device=x.device)
        ids_keep, ids_restore, mask = self.random_masking(mask_noise, mask_ratio)
        latent = self.forward_encoder(patches, ids_keep)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(patches, pred, mask), pred, mask


def gather_tokens(tokens, ids):
    """tokens (B, N, D), ids (B, L) -> (B, L, D). On flattened rows: faster than torch.gather."""
    B, N, D = tokens.shape
    rows = ids + torch.arange(B, device=ids.device)[:, None] * N
    return tokens.reshape(B * N, D).index_select(0, rows.flatten()).reshape(B, -1, D)


# ============ features and decoders ============

def dense_features(encoder, x, n=4):
    """The last n blocks' maps of an image of any size, x (B, C, H, W) -> (B, n*D, h, w).

    An image larger than the encoder's img_size is cut into windows of that size, half a window
    apart, whose maps are blended: a patch counts less near a window's edge.
    """
    H, W = x.shape[-2:]
    P, window = encoder.patch_size, encoder.img_size
    if H % P or W % P:
        raise UserError(f'an image of {H} x {W} pixels does not divide into patches of {P}: cut it '
                        f'to {H // P * P} x {W // P * P}')
    if max(H, W) <= window:
        return torch.cat(encoder.get_intermediate_layers(x, n), dim=1)

    stride = max(P, window // 2 // P * P)
    tops = cut_positions(H, window, stride)
    lefts = cut_positions(W, window, stride)
    weight = blend_weights(window // P).to(x.device)
    total = None
    count = x.new_zeros(H // P, W // P, dtype=torch.float32)
    for top in tops:
        # a row of windows goes through the encoder in one pass
        windows = [x[:, :, top:top + window, left:left + window] for left in lefts]
        maps = torch.cat(encoder.get_intermediate_layers(torch.cat(windows), n), dim=1).float()
        if total is None:
            total = maps.new_zeros(len(x), maps.shape[1], H // P, W // P)
        for left, window_map in zip(lefts, maps.chunk(len(lefts))):
            h, w = window_map.shape[-2:]  # smaller than a window's where the image is
            rows = slice(top // P, top // P + h)
            cols = slice(left // P, left // P + w)
            total[:, :, rows, cols] += window_map * weight[:h, :w]
            count[rows, cols] += weight[:h, :w]
    return total / count


class LinearHead(nn.Module):
    """Batch norm and one 1x1 convolution on the last four blocks' maps"""

    def __init__(self, in_dim, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim)
        self.classifier = nn.Conv2d(in_dim, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps):
        """maps (B, 4*D, h, w) -> logits (B, K, h, w)"""
        return self.classifier(self.norm(maps))


def conv3x3(in_dim, dim):
    """3x3 convolution. Its norm is over groups of channels: so a batch of 1 trains, and N processes
    are as one."""
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, padding=1, bias=False),
                         nn.GroupNorm(8, dim), nn.GELU())


def deconv(in_dim, dim):
    """Transposed convolution that doubles height and width."""
    return nn.Sequential(nn.ConvTranspose2d(in_dim, dim, 2, stride=2, bias=False),
                         nn.GroupNorm(8, dim), nn.GELU())


class ConvHead(nn.Module):
    """Decoder like a UNet's (Ronneberger et al. 2015, arXiv 1505.04597).

    Deconvolutions double the map until a patch is a pixel wide: log2(patch_size) steps. At each an
    earlier block's map joins, brought up by deconvolutions too, since a ViT's maps are all of one
    size (UNETR, arXiv 2103.10504). Maps that find no step (small patches) join at the bottom.
    """

    def __init__(self, in_dim, num_classes, patch_size):
        super().__init__()
        D = in_dim // 4
        steps = round(math.log2(patch_size))
        widths = [max(min(256, D) // 2 ** step, 32) for step in range(steps + 1)]
        self.num_skips = min(steps, 3)
        self.norm = nn.BatchNorm2d(in_dim)
        self.bottom = conv3x3((4 - self.num_skips) * D, widths[0])
        self.up = nn.ModuleList(deconv(widths[i], widths[i + 1]) for i in range(steps))
        self.skips, self.merge = nn.ModuleList(), nn.ModuleList()
        for i in range(self.num_skips):
            dims = [D] + [widths[i + 1]] * (i + 1)
            self.skips.append(nn.Sequential(*(deconv(dims[j], dims[j + 1]) for j in range(i + 1))))
        for i in range(steps):
            joined = 2 if i < self.num_skips else 1
            self.merge.append(conv3x3(joined * widths[i + 1], widths[i + 1]))
        self.classifier = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, maps):
        """maps (B, 4*D, h, w) -> logits (B, K, 2**steps * h, 2**steps * w)"""
        maps = list(self.norm(maps).chunk(4, dim=1))  # earliest block first
        # the latest block starts at the bottom, the one before it joins first
        skips = [maps.pop(-2) for _ in range(self.num_skips)]
        x = self.bottom(torch.cat(maps, dim=1))  # (B, width, h, w)
        for i, (up, merge) in enumerate(zip(self.up, self.merge)):
            x = up(x)
            if i < self.num_skips:
                x = torch.cat([x, self.skips[i](skips[i])], dim=1)
            x = merge(x)
        return self.classifier(x)


class TransformerHead(nn.Module):
    """Segmenter's mask transformer (Strudel et al. 2021, arXiv 2105.05633): class tokens attend to
    patches and to each other; a patch's logits are its cosines with the class tokens, normalised
    over the classes."""

    def __init__(self, in_dim, num_classes, num_heads):
        super().__init__()
        D = in_dim // 4
        self.norm = nn.BatchNorm2d(in_dim)
        self.embed = nn.Linear(in_dim, D)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, D))
        self.blocks = nn.ModuleList(Block(D, num_heads) for _ in range(2))
        self.final_norm = nn.LayerNorm(D, eps=1e-6)
        self.patch_proj = nn.Linear(D, D, bias=False)
        self.class_proj = nn.Linear(D, D, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)

    def forward(self, maps):
        """maps (B, 4*D, h, w) -> logits (B, K, h, w)"""
        B, _, h, w = maps.shape
        K = self.class_tokens.shape[1]
        x = self.embed(self.norm(maps).flatten(2).transpose(1, 2))  # (B, h*w, D)
        x = torch.cat([x, self.class_tokens.expand(B, -1, -1)], dim=1)  # (B, h*w + K, D)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.final_norm(x).split([h * w, K], dim=1)
        patches = F.normalize(self.patch_proj(patches), dim=-1)
        classes = F.normalize(self.class_proj(classes), dim=-1)
        logits = self.mask_norm(patches @ classes.transpose(1, 2))  # (B, h*w, K)
        return logits.transpose(1, 2).reshape(B, K, h, w)


class Segmenter(nn.Module):
    """Encoder and decoder in one module; a frozen encoder stays in eval mode and gets no gradient.

    `pixel_head`, if there is one, adds to the logits what the spectrum of the place says.
    """

    prepare = prepare

    def __init__(self, encoder, head, freeze, pixel_head=None):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.pixel_head = pixel_head
        self.freeze = freeze
        if freeze:
            encoder.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
            self.head.norm.eval()  # its statistics are the training split's (calibrate_norm)
        return self

    def features(self, x):
        """x (B, C, H, W) standardised -> maps (B, 4*D, h, w)"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return dense_features(self.encoder, x)

    def spectra(self, x):
        """x (B, C, H, W) standardised, missing pixels 0 -> (B, 4*C, H, W): the pixel's spectrum
        and its means over the windows of the window floor"""
        missing = (x == 0).all(1, keepdim=True)
        return window_means(x, ~missing, FLOORS['window'])

    def forward(self, x, maps=None):
        """x (B, C, H, W), maps of features() where they are known -> logits (B, K, H, W)"""
        if maps is None:
            maps = self.features(x)
        # a linear head may come before the upsampling, which is linear too: fewer channels
        logits = F.interpolate(self.head(maps), size=x.shape[-2:], mode='bilinear')
        if self.pixel_head is not None:
            logits = logits + self.pixel_head(self.spectra(x))
        return logits


def build_segmenter(encoder, num_classes, decoder, freeze, pixel):
    """A Segmenter whose decoder is logistic or linear (the same network), conv or transformer."""
    if len(encoder.blocks) < 4:
        raise UserError(f'an encoder of {len(encoder.blocks)} blocks: decoders read the maps of '
                        'the last four: give a deeper one')
    in_dim = 4 * encoder.embed_dim
    if decoder == 'conv':
        head = ConvHead(in_dim, num_classes, encoder.patch_size)
    elif decoder == 'transformer':
        if not hasattr(encoder.blocks[0], 'attn'):
            raise UserError('--decoder=transformer has as many heads as the blocks of the encoder, '
                            'and these have no attention: choose another decoder')
        head = TransformerHead(in_dim, num_classes, encoder.blocks[0].attn.num_heads)
    else:
        head = LinearHead(in_dim, num_classes)
    pixel_head = None
    if pixel:
        pixel_head = nn.Conv2d(encoder.in_chans * len(FLOORS['window']), num_classes, 1)
    return Segmenter(encoder, head, freeze, pixel_head)


def calibrate_norm(norm, batches):
    """Set a BatchNorm2d's statistics to those of all maps (B, D, h, w) in `batches`: then training
    is the same on 1 and on N processes."""
    count = total = square = 0
    for maps in batches:
        maps = maps.double()
        count += maps.numel() / maps.shape[1]
        total = total + maps.sum((0, 2, 3))
        square = square + maps.square().sum((0, 2, 3))
    mean = total / count
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((square / count - mean.square()).clamp(min=1e-12))


def segmentation_loss(logits, target, weight, kind):
    """logits (B, K, H, W), target (B, H, W) classes or 255 = ignored, weight (K,) -> sum of losses
    over the pixels ('dice': over the images). The caller divides it by loss_count() over all
    processes: where few pixels have labels, the mean of their means is not the mean of all.

    ce: -log p, with p the probability of the right class; focal: -(1 - p)^2 log p.
    dice: 1 - mean over the image's classes of 2 sum(p t) / (sum(p) + sum(t)), sums over its known
    pixels, t = 1 at those of the class.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    known = target != IGNORE_INDEX
    safe = target.where(known, 0)
    if kind == 'dice':
        p = log_p.exp() * known[:, None]
        t = F.one_hot(safe, logits.shape[1]).movedim(-1, 1) * known[:, None]
        both = (p * t).sum((2, 3))  # (B, K)
        size = t.sum((2, 3))
        dice = 2 * both / (p.sum((2, 3)) + size).clamp(min=1e-6)
        present = size > 0
        loss = 1 - (dice * present).sum(1) / present.sum(1).clamp(min=1)
        return (loss * present.any(1)).sum()
    pixel_loss = F.nll_loss(log_p, target, weight, ignore_index=IGNORE_INDEX, reduction='none')
    if kind == 'focal':
        p = log_p.gather(1, safe[:, None])[:, 0].exp()
        pixel_loss = pixel_loss * (1 - p).square()
    return pixel_loss.sum()  # 0 where ignored


def loss_count(target, weight, kind):
    """What segmentation_loss is to be divided by: the sum of the known pixels' weights, or for dice
    the number of images that have known pixels."""
    known = target != IGNORE_INDEX
    if kind == 'dice':
        return known.flatten(1).any(1).sum().float()
    return (weight[target.where(known, 0)] * known).sum()


# ============ the CNN baseline ============

class Bottleneck(nn.Module):
    """Residual block of ResNet-50 (arXiv 1512.03385) with torchvision's names of parameters."""

    def __init__(self, in_dim, dim, stride, dilation):
        super().__init__()
        out_dim = 4 * dim
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self.downsample = None
        if stride > 1 or in_dim != out_dim:
            self.downsample = nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, stride, bias=False),
                                            nn.BatchNorm2d(out_dim))
        nn.init.zeros_(self.bn3.weight)  # a block starts as the identity (Goyal et al. 2017)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def conv_bn(in_dim, dim, kernel=3, stride=1, dilation=1, groups=1):
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_dim, dim, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU())


def separable(in_dim, dim, dilation=1):
    """3x3 convolution of each channel by itself, then 1x1 over the channels: a ninth of the work
    (DeepLabV3+, section 3.1)."""
    return nn.Sequential(conv_bn(in_dim, in_dim, 3, dilation=dilation, groups=in_dim),
                         conv_bn(in_dim, dim, 1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611) on ResNetV1c-50: the dissertation's CNN.

    Stage 4 is seen by atrous convolutions at several rates (ASPP); the result is upsampled and
    merged with stage 1 for its edges. An FCN head on stage 3 gives a second, auxiliary output for
    training. `stem` 'three' is V1c's three 3x3 convolutions, 'seven' the one 7x7 of torchvision's
    ResNet; both halve the image, and pooling halves it again. `output_stride` 16 or 8 is the
    pixels between two features of stage 4.
    """

    prepare = prepare

    def __init__(self, in_chans=32, num_classes=24, output_stride=16, stem='three', width=64,
                 blocks=(3, 4, 6, 3), head_dim=256):
        super().__init__()
        if output_stride not in (8, 16):
            raise UserError(f'--output_stride={output_stride}: choose 16 or 8')
        # ---- backbone
        self.stem = None
        if stem == 'three':
            self.stem = nn.Sequential(conv_bn(in_chans, width // 2, stride=2),
                                      conv_bn(width // 2, width // 2), conv_bn(width // 2, width))
        else:
            self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
        if output_stride == 16:
            strides, dilations, rates = (1, 2, 2, 1), (1, 1, 1, 2), (6, 12, 18)
        else:
            strides, dilations, rates = (1, 2, 1, 1), (1, 1, 2, 4), (12, 24, 36)
        in_dim = width
        for i in range(4):
            dim = width * 2 ** i
            stage = [Bottleneck(in_dim, dim, strides[i], dilations[i])]
            in_dim = 4 * dim
            stage += [Bottleneck(in_dim, dim, 1, dilations[i]) for _ in range(blocks[i] - 1)]
            setattr(self, f'layer{i + 1}', nn.Sequential(*stage))
        # ---- head
        self.aspp = nn.ModuleList([conv_bn(in_dim, head_dim, 1)])
        self.aspp.extend(separable(in_dim, head_dim, rate) for rate in rates)
        # of the mean over the image; no batch norm: one value a tile is too few to norm by
        self.pool = nn.Conv2d(in_dim, head_dim, 1)
        self.bottleneck = conv_bn(5 * head_dim, head_dim, 1)
        self.low_level = conv_bn(4 * width, 48, 1)
        self.merge = nn.Sequential(separable(head_dim + 48, head_dim),
                                   separable(head_dim, head_dim), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(head_dim, num_classes, 1)
        self.auxiliary = nn.Sequential(conv_bn(in_dim // 2, head_dim), nn.Dropout(0.1),
                                       nn.Conv2d(head_dim, num_classes, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x):
        """x (B, C, H, W) standardised -> logits (B, K, H, W), in training two of them"""
        size = x.shape[-2:]
        x = F.relu(self.bn1(self.conv1(x))) if self.stem is None else self.stem(x)
        low = self.layer1(F.max_pool2d(x, 3, 2, 1))  # (B, 256, H/4, W/4)
        middle = self.layer3(self.layer2(low))  # (B, 1024, H/16, W/16) at output stride 16
        x = self.layer4(middle)  # (B, 2048, H/16, W/16)
        pooled = F.relu(self.pool(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[-2:])
        x = self.bottleneck(torch.cat([branch(x) for branch in self.aspp] + [pooled], dim=1))
        x = F.interpolate(x, size=low.shape[-2:], mode='bilinear')
        x = self.merge(torch.cat([x, self.low_level(low)], dim=1))
        logits = F.interpolate(self.classifier(x), size=size, mode='bilinear')
        if not self.training:
            return logits
        return logits, F.interpolate(self.auxiliary(middle), size=size, mode='bilinear')


# ============ what a training loop needs ============

def all_rows(x):
    """x (n, ...) of this process -> those of all processes, one after the other"""
    if not dist.is_initialized():
        return x
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x)
    return torch.cat(everyone)


def native_bfloat16(device):
    """Does the hardware multiply bfloat16 itself? A CPU that must emulate it is up to 80 times
    slower than in float32."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return any(hasattr(torch.cpu, check) and getattr(torch.cpu, check)() for check in checks)


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """Groups for AdamW, each with 'name', 'params', 'weight_decay' and 'lr_scale'.

    'matrices' decay; 'vectors' (biases, norms, tokens, positions) do not; 'prototypes' are apart
    because DINO holds them still at first. The learning rate of a group is to be multiplied by its
    lr_scale: layer_decay ** (blocks above it), as in BEiT and MAE (Clark et al. 2020).
    """
    depth = len(model.encoder.blocks) if layer_decay < 1 else 0
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, decay = 'matrices', weight_decay
        if 'last_layer' in name:
            kind = 'prototypes'
        elif parameter.ndim == 1 or name.endswith(('_token', '_tokens', 'pos_embed')):
            kind, decay = 'vectors', 0.0
        above = 0  # decoders and heads
        block = re.match(r'encoder\.\D+\.(\d+)\.', name)
        if block:
            above = depth - int(block[1])
        elif re.match(r'encoder\.\w*(embed|token)', name):
            above = depth + 1  # patch embedding, tokens and positions come before the first block
        lr_scale = layer_decay ** above
        group = {'name': kind, 'params': [], 'weight_decay': decay, 'lr_scale': lr_scale}
        groups.setdefault((kind, lr_scale), group)['params'].append(parameter)
    return list(groups.values())


# ============ checkpoints ============

def save_checkpoint(path, content):
    """Atomic: a kill or a full disk leaves the file before as it was. Refuses what could not be
    read again."""
    if 'script' in content:  # of a run, not weights alone
        script = content['script']
        content = {**content, 'code': RUNNING.get(script) or code_of(script)}
    try:
        with open(f'{path}.tmp', 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(f'{path}.tmp')
        if unsafe:  # numpy's numbers, for example
            raise UserError(f'{path}: not written, since its {unsafe[0]} could not be read again '
                            'safely: make it a tensor, number, text, list or dictionary')
        os.replace(f'{path}.tmp', path)
    except (OSError, RuntimeError) as error:
        raise UserError(f'{path}: could not be written ({one_line(error)}): make room, or choose '
                        'another place, and run the same command again; the checkpoint before is '
                        'as it was') from None


RUNNING = {}  # script -> code_of() it when its run began: files may be edited while it goes on


def code_of(script):
    """A number that is another one when a script, models.py or data.py was changed"""
    folder, number = os.path.dirname(os.path.abspath(__file__)), 0
    for name in (script, 'models.py', 'data.py'):
        with contextlib.suppress(OSError):
            with open(os.path.join(folder, name), 'rb') as file:
                number = zlib.crc32(file.read(), number)
    return number


def load_checkpoint(path):
    """The dictionary in a checkpoint file. Runs no code from the file; raises UserError for a
    damaged or foreign one."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such checkpoint: pass the last.pt of a run directory')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f'it holds a {type(content).__name__}')
        if zipfile.is_zipfile(path):
            # torch looks at no checksum: a flipped bit would be a wrong weight
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f'{damaged} in it is damaged')
        return content
    except Exception as error:  # whatever a damaged file makes the reader do
        raise UserError(f'{path}: not a checkpoint that can be read safely ({one_line(error)}): '
                        'pass a file written by one of these scripts') from None


# constants that may differ when a run resumes; of data and encoder the contents are compared
MAY_CHANGE = ('out_dir', 'max_steps', 'log_every', 'eval_every', 'save_every', 'compile',
              'cuda_graphs', 'wandb_log', 'data', 'encoder')


def resume_from(path, script, config, meta):
    """The checkpoint at `path`, or None. Refuses that of another script, of other constants than
    `config` (but for MAY_CHANGE), and of other data than `meta` tells of. Other code is said."""
    script = os.path.basename(script)
    RUNNING[script] = code_of(script)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + '.tmp')  # of a save that was cut off
    if not os.path.exists(path):
        return None
    checkpoint = load_run(path)
    advice = 'pass another --out_dir'
    if checkpoint['script'] != script:
        raise UserError(f'{path}: was written by {checkpoint["script"]}: {advice}')
    old = checkpoint['config']
    changed = [f'{name} ({old.get(name)} there, {value} now)' for name, value in config.items()
               if old.get(name) != value and name not in MAY_CHANGE]
    if changed:
        raise UserError(f'{path}: is of a run with other constants: {", ".join(changed)}: {advice}')
    old, now = checkpoint['meta'], kept_meta(meta)
    changed = sorted(name for name in old if name in now and old[name] != now[name])
    if changed:
        raise UserError(f'{path}: is of a run on other data: {" and ".join(changed)} in meta.json '
                        f'of {config["data"]} are not the same: {advice}')
    if checkpoint.get('code') != RUNNING[script]:
        print(f'{path}: the code has changed since it was written, and this run goes on with '
              f'the new one: for a run of the new code alone {advice}')
    return checkpoint


def load_run(path):
    """load_checkpoint() of a file that one of our scripts wrote; others are refused."""
    checkpoint = load_checkpoint(path)
    missing = {'model', 'config', 'encoder_args', 'meta', 'script'} - set(checkpoint)
    if missing:
        raise UserError(f'{path}: was not written by these scripts (it has no {min(missing)}); to '
                        f'bring a public file into their form: python tools/convert_weights.py '
                        f'--weights={path} --data=...')
    return checkpoint


@contextlib.contextmanager
def built_again(path):
    """Makes a UserError of what goes wrong when a network is built from a checkpoint"""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'{path}: its network cannot be built again ({one_line(error)}): pass the '
                        'last.pt or best.pt of a run, and of a network of your own make '
                        'models.build_encoder build it') from None


def add_run(network, checkpoint):
    """Give a network what the checkpoint knows of its run: with prepare() a checkpoint is enough
    to use it."""
    network.config = checkpoint['config']
    network.args = checkpoint['encoder_args']
    network.script = checkpoint['script']
    network.meta = checkpoint['meta']
    network.whiten = network.config['whiten']
    network.statistics = standardization(network.meta, network.whiten)
    return network.eval()


def load_encoder(path):
    """The encoder of any of our files, in eval mode: of a DINO run the teacher, as its papers do;
    of a best.pt the encoder that was judged or fine-tuned.

    It has the run's constants `.config`, its own arguments `.args`, `.script`, `.meta` (statistics,
    wavelengths, classes), `.whiten`, and `.prepare(raw)`: raw values (B, C, H, W) or (C, H, W)
    -> its input. Raises UserError when the file is damaged, foreign, or holds no encoder.
    """
    checkpoint = load_run(path)
    with built_again(path):
        weights = checkpoint['model']
        teacher = any(name.startswith('teacher.') for name in weights)
        prefix = 'teacher.encoder.' if teacher else 'encoder.'
        own = {name.removeprefix(prefix): value for name, value in weights.items()
               if name.startswith(prefix)}
    if not own:
        raise UserError(f'{path}: was written by {checkpoint["script"]} and holds no encoder (its '
                        'weights are named "encoder. ..."): pass the last.pt of a pre-training run')
    with built_again(path):
        encoder = build_encoder(checkpoint['encoder_args'])
        encoder.load_state_dict(own, strict=True)
        return add_run(encoder, checkpoint)


def build_encoder(args):
    """encoder_args of a checkpoint -> a ViT or SpatialSpectralViT with random weights"""
    return SpatialSpectralViT(**args) if 'fusion' in args else ViT(**args)


def tiles_of(encoder, path):
    """The tile directory that an encoder, loaded from the file `path`, learned from"""
    directory = encoder.config.get('data')
    if not directory:  # of a training loop of one's own
        raise UserError(f'{path}: does not say which tiles it learned from: pass --data')
    return directory


def load_segmenter(path):
    """The network in a best.pt of segment.py or baseline_deeplab.py, in eval mode.

    network(network.prepare(raw)).softmax(1) are the classes' probabilities (B, K, H, W). It has
    what load_encoder() gives, and `.window`: the side it is to be used at, px.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: is not there: segment.py and baseline_deeplab.py write it into '
                        'their --out_dir')
    checkpoint = load_run(path)
    config, args = checkpoint['config'], checkpoint['encoder_args']
    if 'window' not in checkpoint:
        raise UserError(f'{path}: holds no segmentation: pass the best.pt of a run of segment.py '
                        'or baseline_deeplab.py')
    with built_again(path):
        if checkpoint['script'] == 'segment.py':
            network = build_segmenter(build_encoder(args), checkpoint['meta']['num_classes'],
                                      config['decoder'], config['freeze'], config['pixel'])
        else:
            network = DeepLabV3Plus(**args)
        network.load_state_dict(checkpoint['model'], strict=True)
        network.window = checkpoint['window']
        return add_run(network, checkpoint)


def check_bands(own_meta, meta, path):
    """Refuses data (its `meta`) of other bands than the network of the file `path` was trained on
    (`own_meta`). Where the wavelengths of one are not known, only the number can be compared."""
    own, given = own_meta['wavelengths_nm'], meta['wavelengths_nm']
    count = own_meta['num_bands']
    same = count == meta['num_bands']
    if same and own and given:
        same = same_bands(own, given)
    if not same:
        settings = own_meta.get('settings', {})
        bands = settings.get('bands') or ','.join(f'{nm:g}' for nm in own or [])
        how = f'python data.py tile --bands={bands}' if bands else 'the bands of its own data'
        if bands and settings.get('normalize') == 'scene':
            how += ' --normalize=scene'
        raise UserError(f'{path}: the network was trained on {count} bands, and those of the data '
                        f'({meta["num_bands"]}) are others: tile the scenes again with {how}')
    if own_meta.get('components') != meta.get('components'):
        raise UserError(f'{path}: the network was trained on the principal components of other '
                        'data, which mean something else here: pass the data it was trained on')


# ============ starting from other weights ============

def encoder_shape(path, checkpoint=None):
    """-> the arguments of an encoder that a run must share with it to start from its weights: those
    of its own `checkpoint`, if it resumes, else those in the file `path`, if one is given"""
    if not path:
        return {}
    args = checkpoint['encoder_args'] if checkpoint else load_encoder(path).args
    if 'num_heads' in args:  # a ViT, and no network of one's own
        parameters = inspect.signature(ViT).parameters.items()
        args = {name: value.default for name, value in parameters} | args
    shared = ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'ffn', 'num_register_tokens',
              'init_values')
    return {name: args[name] for name in shared if name in args}


def resize_positions(weights, like):
    """Tensors by name -> the same, the positions of patches interpolated to the grids of `like`."""
    weights = dict(weights)
    for name, table in weights.items():
        if re.search(r'(^|\.|decoder_)pos_embed$', name) and name in like:
            side = math.isqrt(like[name].shape[1] - 1)
            patches = interpolate_positions(table[:, 1:], side, side)
            weights[name] = torch.cat([table[:, :1], patches], dim=1)
    return weights


def start_from(path, model, script, whiten, meta=None):
    """Fill `model` with weights of a checkpoint -> a sentence that says which were taken, and
    whether their input was whitened otherwise than by `whiten` components. Those of other bands
    than the data's (its `meta`) are refused.

    Of a run of the same `script` all are taken. Of another file the encoder is, for student and
    teacher alike, and where they fit a masked autoencoder's decoder and a CNN's layers. Position
    tables are interpolated. Raises UserError where something does not fit.
    """
    checkpoint = load_run(path)
    if meta:
        check_bands(checkpoint['meta'], meta, path)
    weights, state = checkpoint['model'], model.state_dict()
    same_script = checkpoint['script'] == os.path.basename(script)
    name_in_file = {name: name for name in state}
    if not same_script:
        # of a student and a teacher, the teacher is the encoder that its run was for
        weights = {name.removeprefix('teacher.'): value for name, value in weights.items()
                   if re.match(r'(teacher\.)?encoder\.|decoder_|mask_token|layer|conv1|bn1', name)}
        name_in_file = {name: re.sub(r'^(student|teacher)\.', '', name) for name in state}
    own = {name_in_file[name]: value for name, value in state.items()}
    weights = resize_positions(weights, own)
    taken = {name for name in own.keys() & weights.keys()
             if own[name].shape == weights[name].shape}
    differ = (own.keys() | weights.keys()) - taken
    if not same_script:
        # the decoder is taken whole or not at all, but for its last layer: that makes pixels, and
        # fits only where patch and bands are the same
        decoder = {name for name in own if name.startswith(('decoder_', 'mask_token'))}
        if not decoder - taken <= {'decoder_pred.weight', 'decoder_pred.bias'}:
            taken -= decoder
        # the encoder has to be complete, but for mask tokens and the second stream
        optional = ('encoder.mask_token', 'encoder.spectral_', 'encoder.fuse.')
        differ = {name for name in differ
                  if name.startswith(('encoder.', 'layer')) and not name.startswith(optional)}
    if differ:
        raise UserError(f'{path}: does not fit this network: {len(differ)} tensors differ '
                        f'({", ".join(sorted(differ)[:4])} ...): pass the --size, --patch_size, '
                        '--out_dim and data of the command that wrote it')
    model.load_state_dict({name: weights[source] for name, source in name_in_file.items()
                           if source in taken}, strict=False)  # the others stay as they are
    sentence = (f'{path}: {len(taken)} tensors taken; what starts fresh: '
                f'{names_of(own.keys() - taken)}')
    left_out = weights.keys() - own.keys()
    if left_out:
        sentence += f'; what is left out of the file: {names_of(left_out)}'
    learned = checkpoint['config']['whiten']
    if learned != whiten:
        sentence += f'; they learned with --whiten={learned}, here it is {whiten}'
    return sentence


def names_of(names):
    """Names of tensors -> the networks they belong to, as words"""
    words = {re.match(r'(?:encoder\.)?(decoder_pred|decoder|spectral|\w+)', name)[1]
             for name in names}
    return ', '.join(sorted(words)) or 'nothing'

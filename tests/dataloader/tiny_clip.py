"""CLIP models of a few kilobytes with random weights, in the usual folder layouts."""

import json
from pathlib import Path

DIM, SIDE = 12, 32


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A plain transformers checkpoint: images of 32 x 32 pixels in patches of 8, a vocabulary of four words."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True)
    text = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(seed)
    # Larger weights than usual: different images get different vectors without training.
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM,
                         initializer_factor=5.0)).save_pretrained(folder)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE},
        "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711]}))
    return folder


def write_hub_clip(folder: Path, seed: int = 0) -> Path:
    """The same model in the layout of sentence-transformers/clip-ViT-B-32: in a subfolder named by modules.json."""
    write_clip(folder / "0_CLIPModel", seed)
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({
        "__version__": {"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.0"}}))
    return folder


def write_saved_clip(folder: Path, checkpoint: Path) -> Path:
    """The model of a checkpoint as the current sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(checkpoint), device="cpu").save(str(folder), create_model_card=False)
    return folder

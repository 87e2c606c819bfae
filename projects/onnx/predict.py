"""predict.py model.onnx photo.jpg found.png > found.json (ONNX Runtime, NumPy and Pillow do)"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def predict(session: onnxruntime.InferenceSession, image: Image.Image) -> list[dict]:
    """Detections in an RGB image, best first; boxes and points as x, y in its pixels."""
    about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    scale = min(about["min_size"] / min(image.size), about["max_size"] / max(image.size)) or 1.0
    size = [int(side * scale + 0.5) for side in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    pixels = pixels[:, :, :: -1 if about["input_format"] == "BGR" else 1]
    outputs = session.run(None, {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1))})
    names, back, found = [x.name for x in session.get_outputs()], np.array(image.size) / size, []
    for values in zip(*outputs, strict=True):
        thing = dict(zip(names, values, strict=True))
        box = thing.pop("boxes").reshape(2, 2) * back
        if min(box[1] - box[0]) <= 0 or np.prod(box[1] - box[0]) <= about["min_box_area"]:
            continue
        name, score = about["class_names"][thing.pop("classes")], float(thing.pop("scores"))
        entry = {"class": name, "score": score, "box": box.flatten().tolist()}
        for kind, value in thing.items():  # scores, masks, or points, with a score of keypoints
            if value.ndim and kind != "masks":
                value = np.hstack([value[:, :2] * back, value[:, 2:]])
            entry[kind] = value.tolist()
        found.append(entry | ({"skeleton": about["skeleton"]} if "keypoints" in entry else {}))
    return found


def draw(picture: Image.Image, found: list[dict]) -> None:
    """Boxes, contours or masks, and skeletons of what has a score above 0.5."""
    canvas, width = ImageDraw.Draw(picture), max(1, min(picture.size) // 200)
    for number, thing in enumerate(x for x in found if x["score"] > 0.5):
        colour = f"hsl({number * 67 % 360}, 80%, 45%)"
        canvas.rectangle(thing["box"], outline=colour, width=width)
        canvas.text(thing["box"][:2], f"{thing['class']} {thing['score']:.2f}", fill=colour)
        if "masks" in thing:  # probabilities in cells that fill a box, here given by two corners
            (x1, y1), (x2, y2) = np.floor(thing["mask_boxes"]).astype(int).tolist()
            mask = Image.fromarray(np.float32(thing["masks"])).resize((x2 - x1 + 1, y2 - y1 + 1))
            picture.paste(colour, (x1, y1), Image.fromarray(np.uint8(120 * (np.array(mask) > 0.5))))
        outline = [tuple(point) for point in thing.get("contours", [])]
        canvas.line(outline + outline[:1], fill=colour, width=width)
        for bone in thing.get("skeleton", []):
            ends = [thing["keypoints"][end] for end in bone if thing["keypoints"][end][2] > 0.5]
            canvas.line([(x, y) for x, y, _ in ends], fill=colour, width=2 * width)


if __name__ == "__main__":
    model, file, output = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    image = ImageOps.exif_transpose(Image.open(file))
    deep = image.mode.startswith("I")  # 16 bits of grey, of which convert() would keep the lower
    picture = (Image.fromarray(np.uint8(np.asarray(image) >> 8)) if deep else image).convert("RGB")
    print(json.dumps(found := predict(onnxruntime.InferenceSession(model), picture)))
    draw(picture, found)
    picture.save(output)

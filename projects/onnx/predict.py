"""predict.py model.onnx photo.jpg found.png > found.json (ONNX Runtime, NumPy and Pillow do)"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

THRESHOLD = 0.5  # lowest score that is drawn
COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6"]


def predict(session: onnxruntime.InferenceSession, image: Image.Image) -> list[dict]:
    """Detections in an RGB image, best first; boxes and points as x, y in its pixels."""
    about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    scale = min(about["min_size"] / min(image.size), about["max_size"] / max(image.size)) or 1.0
    size = [int(side * scale + 0.5) for side in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    pixels = pixels[:, :, :: -1 if about["input_format"] == "BGR" else 1]
    outputs = session.run(None, {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1))})
    names, back = [x.name for x in session.get_outputs()], np.array(image.size) / size
    found = []
    for values in zip(*outputs, strict=True):
        thing = dict(zip(names, values, strict=True))
        box = thing.pop("boxes").reshape(2, 2) * back
        if min(box[1] - box[0]) <= 0 or np.prod(box[1] - box[0]) <= about["min_box_area"]:
            continue
        name, score = about["class_names"][thing.pop("classes")], float(thing.pop("scores"))
        entry = {"class": name, "score": score, "box": box.flatten().tolist()}
        for kind, value in thing.items():  # scores, or points; keypoints have a third column
            value = np.hstack([value[:, :2] * back, value[:, 2:]]) if value.ndim else value
            entry[kind] = value.tolist()
        found.append(entry | ({"skeleton": about["skeleton"]} if "keypoints" in entry else {}))
    return found


def draw(picture: Image.Image, found: list[dict]) -> None:
    """Boxes, contours and skeletons of what is above the threshold."""
    canvas, width = ImageDraw.Draw(picture), max(1, min(picture.size) // 200)
    for number, thing in enumerate(x for x in found if x["score"] > THRESHOLD):
        colour = COLOURS[number % len(COLOURS)]
        canvas.rectangle(thing["box"], outline=colour, width=width)
        canvas.text(thing["box"][:2], f"{thing['class']} {thing['score']:.2f}", fill=colour)
        outline = [tuple(point) for point in thing.get("contours", [])]
        canvas.line(outline + outline[:1], fill=colour, width=width)
        for bone in thing.get("skeleton", []):
            ends = [thing["keypoints"][end] for end in bone]
            if min(score for _, _, score in ends) > THRESHOLD:
                canvas.line([(x, y) for x, y, _ in ends], fill=colour, width=2 * width)


if __name__ == "__main__":
    model, file, output = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    image = ImageOps.exif_transpose(Image.open(file))
    deep = image.mode.startswith("I")  # 16 bits of grey, of which convert() would keep the lower
    picture = (Image.fromarray(np.uint8(np.asarray(image) >> 8)) if deep else image).convert("RGB")
    print(json.dumps(found := predict(onnxruntime.InferenceSession(model), picture)))
    draw(picture, found)
    picture.save(output)

import os, sys, multiprocessing as mp, time, traceback, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

torch.set_num_threads(1)
from tests.transformers.families import *
import transformers

transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")


def work(name, q):
    try:
        q.put(compare(name))
    except BaseException as e:
        tb = traceback.extract_tb(e.__traceback__)[-1]
        q.put(f"{type(e).__name__}: {str(e)[:150]} @{tb.filename.split('/')[-1]}:{tb.lineno}")


def run(name, limit=90):
    q = mp.get_context("fork").SimpleQueue()
    p = mp.get_context("fork").Process(target=work, args=(name, q))
    p.start()
    t = time.time()
    while time.time() - t < limit and q.empty() and p.is_alive():
        time.sleep(0.02)
    r = q.get() if not q.empty() else "timeout or died"
    p.kill()
    p.join()
    return r


names = sys.argv[1:] or causal_classes() + MULTIMODAL
ok = 0
for n in names:
    t = time.time()
    r = run(n)
    if isinstance(r, Result):
        good = r.fused and r.loss_error <= 1e-5 and r.gradient_error <= 1e-4
        ok += good
        if not good or len(names) < 10:
            print(n, r, round(time.time() - t, 1), flush=True)
    else:
        print("ERR", n, r.replace("\n", " "), round(time.time() - t, 1), flush=True)
print(ok, len(names))

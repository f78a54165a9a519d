"use strict";
(() => {
  const form = document.getElementById("controls");
  const status = document.getElementById("status");
  const number = document.getElementById("number");
  const phone = document.getElementById("phone");
  const order = document.getElementById("order");
  // The rows of the table, and the cards: one of each per codeword.
  const groups = [...document.querySelectorAll(".sorted")].map((parent) => [parent, [...parent.children]]);

  // These ascend; everything else descends.
  const rises = new Set(["code", "place"]);
  const compare = (first, second) => {
    const by = order.value;
    const difference = Number(first.dataset[by]) - Number(second.dataset[by]);
    return (rises.has(by) ? difference : -difference) || Number(first.dataset.code) - Number(second.dataset.code);
  };

  const isShown = (entry) => {
    const wanted = number.value.trim();
    const fits = !wanted || entry.dataset.code === wanted;
    return fits && (!phone || !phone.value || JSON.parse(entry.dataset.phones).includes(phone.value));
  };

  const update = () => {
    for (const [parent, entries] of groups) {
      for (const entry of [...entries].sort(compare)) {
        entry.hidden = !isShown(entry);
        parent.append(entry);
      }
    }
    const entries = groups[0][1];
    status.textContent = `${entries.filter((entry) => !entry.hidden).length} of ${entries.length} codewords`;
  };

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  // The fields keep their old values until the event is over.
  form.addEventListener("reset", () => setTimeout(update));
  // A browser may restore the fields after a reload.
  update();

  const showTarget = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!target) return;
    if (target.hidden) {
      form.reset();
      setTimeout(() => target.scrollIntoView());
    }
  };
  addEventListener("hashchange", showTarget);

  let sound = null;
  let pressed = null;

  const stop = () => {
    if (sound) sound.pause();
    if (pressed) pressed.setAttribute("aria-pressed", "false");
    sound = pressed = null;
  };

  let isFollowed = false;
  const follow = () => {
    isFollowed = Boolean(sound);
    if (!sound) return;
    const share = sound.duration ? (100 * sound.currentTime) / sound.duration : 0;
    const cursor = pressed.querySelector(".cursor");
    cursor.setAttribute("x1", share);
    cursor.setAttribute("x2", share);
    requestAnimationFrame(follow);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.play");
    if (!button) return;
    const again = button === pressed;
    stop();
    if (again) return;
    pressed = button;
    pressed.setAttribute("aria-pressed", "true");
    const own = new Audio(button.dataset.src);
    sound = own;
    own.addEventListener("ended", () => own === sound && stop());
    own.play().catch((error) => {
      // A sound that was stopped before it began fails too, when another may be playing.
      if (own !== sound) return;
      stop();
      status.textContent = `This browser cannot play the moment: ${error.message}`;
    });
    if (!isFollowed) follow();
  });
})();

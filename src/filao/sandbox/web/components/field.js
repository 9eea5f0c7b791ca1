// A field of a form. What is typed stays here until it is done: an update of the page must not overwrite it half-way.

export default {
  props: { label: String, kind: String, initial: [String, Boolean], bounds: Array, options: Object },
  emits: ["typed", "changed"],
  data() {
    return { value: this.initial };
  },
  template: `
    <label :class="kind === 'check' ? 'check' : 'field'" :style="kind === 'area' ? 'width: 100%' : ''">
      <input v-if="kind === 'check'" ref="field" type="checkbox" v-model="value" @change="$emit('changed', value)" />
      <span>{{ label }}</span>
      <input v-if="kind === 'number'" ref="field" type="number" step="any" :min="bounds[0]" :max="bounds[1]" v-model="text" @change="$emit('changed', text)" />
      <select v-if="kind === 'select'" ref="field" v-model="text" @change="$emit('changed', text)">
        <option v-for="(name, key) in options" :key="key" :value="key">{{ name }}</option>
      </select>
      <textarea v-if="kind === 'area'" ref="field" rows="3" spellcheck="false" v-model="text" @change="$emit('changed', text)"></textarea>
    </label>`,
  computed: {
    text: {
      get() {
        return this.value;
      },
      set(value) {
        this.value = String(value);
        this.$emit("typed", this.value);
      },
    },
  },
  methods: {
    show(value) {
      if (document.activeElement !== this.$refs.field || typeof value === "boolean") this.value = value;
    },
  },
};
